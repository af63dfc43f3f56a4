"""CandidatePolicy: a next-item model as a policy, which proposes candidates for prompts and scores them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.func import functional_call

from reclingua.decoding.beam_search import beam_search
from reclingua.decoding.item_samples import sample_items
from reclingua.decoding.item_scores import score_items, token_log_probs
from reclingua.inference.recommender import Recommender
from reclingua.models.tree_attention import supports_trees
from reclingua.utils.errors import InputError


class CandidatePolicy:
    """A model that is trained on its own candidates, and the frozen copy of its trained weights as it began.

    Only trained weights are copied: with LoRA the frozen model shares the others.

    Args:
        recommender: with the model that is trained.
        num_candidates: candidates of each prompt.
        strategy: "beam", the best items by beam search; "sample", drawn without replacement by stochastic beam search.
        score_over: what probabilities are normalised over, see `beam_search`.

    Raises:
        InputError: the model's attention does not support candidates as branches behind a prompt.
    """

    def __init__(
        self,
        recommender: Recommender,
        num_candidates: int,
        strategy: Literal["beam", "sample"] = "beam",
        score_over: str = "vocabulary",
    ):
        self.model, self.selector = recommender.model, recommender.selector
        self.trie = recommender.trie
        self.num_candidates, self.strategy, self.score_over = num_candidates, strategy, score_over
        if not supports_trees(self.model):
            raise InputError(
                f"{type(self.model).__name__}: its attention does not support several candidates behind one prompt "
                "(4-D masks over all tokens), so its candidates cannot be trained in one pass"
            )
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.reference = {name: weight.detach().clone() for name, weight in trained.items()}

    def propose(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        excluded: torch.Tensor | None,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return candidates by their scores, best first.

        Args:
            input_ids, attention_mask, excluded: as in `beam_search`.
            generator: of the samples, on the model's device.

        Returns:
            item numbers, int64 [batch, num_candidates], -1 where no item is left; scores, float32, -inf for -1.
        """
        self.trie.to(self.model.device)
        prompt = (self.model, input_ids, attention_mask, self.trie)
        if self.strategy == "sample":
            items = sample_items(*prompt, self.num_candidates, generator, excluded, self.selector)
            scores = score_items(*prompt, items, self.score_over, self.selector)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            return items.gather(1, order), scores
        lists = beam_search(*prompt, self.num_candidates, excluded, self.score_over, self.selector)
        items = torch.full((len(lists), self.num_candidates), -1, device=input_ids.device)
        scores = torch.full(items.shape, -torch.inf, device=input_ids.device)
        for row, ranked in enumerate(lists):
            numbers = [self.trie.item_to_number[entry.item] for entry in ranked]
            items[row, : len(ranked)] = torch.tensor(numbers, device=items.device)
            scores[row, : len(ranked)] = torch.tensor([entry.score for entry in ranked], device=items.device)
        return items, scores

    def log_probs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        items: torch.Tensor,
        forward: Callable[..., Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates' `token_log_probs` by the model, with gradients."""
        prompt = (self.model, input_ids, attention_mask, self.trie)
        return token_log_probs(*prompt, items, self.score_over, forward)

    @torch.no_grad()
    def reference_log_probs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, items: torch.Tensor
    ) -> torch.Tensor:
        """Return the candidates' log-probabilities by the frozen model, float32 [batch, candidates, depth]."""

        def forward(**inputs):
            return functional_call(self.model, self.reference, (), inputs)

        return self.log_probs(input_ids, attention_mask, items, forward)[0]

    def shared_codes(self, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the share of the target's tokens with which each item begins, float32 [batch, candidates].

        Args:
            items: int64 [batch, candidates], -1 for none.
            targets: int64 [batch].
        """
        of_items = torch.stack(self.trie.paths(items)[1:], dim=2)
        of_targets = torch.stack(self.trie.paths(targets[:, None])[1:], dim=2)
        shared = ((of_items == of_targets) & (of_targets >= 0)).sum(2)  # equal states have equal paths
        return torch.where(items == targets[:, None], 1.0, shared / (of_targets >= 0).sum(2))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its weights of the beginning."""
        for name, weight in self.model.named_parameters():
            if name in self.reference:
                weight.copy_(self.reference[name])
