"""CoLLM (arXiv 2310.19488): collaborative embeddings become soft tokens of the prompt.

A network maps the embedding of a user or an item to the place in the language model's own embedding space where it is
read as a word (section 3.2). Soft prompts and personalised prompts are the same with embeddings that nobody trained
before, one for all or one for each.
"""

import torch
from torch import nn

from reclingua.models.yes_no import YesNoConfig, YesNoModel


class CoLLMConfig(YesNoConfig):
    """
    Args:
        soft_tokens: soft tokens for each id.
        one_for_all: every user has the same embedding, and every item (soft prompt).
    """

    model_type = "recommender-collm"

    soft_tokens: int = 1
    one_for_all: bool = False


class CoLLM(YesNoModel):
    """Reads collaborative embeddings where a prompt has soft tokens."""

    config_class = CoLLMConfig

    def build_projector(self) -> None:
        """One network for all embeddings of the same width: d -> 10 d -> ReLU -> soft_tokens x hidden."""
        super().build_projector()
        embedding = self.get_input_embeddings()
        out, spread = self.config.soft_tokens * embedding.embedding_dim, embedding.weight.float().std().item()
        self.maps = nn.ModuleDict()
        for d in sorted({self.cf_model.user_width, self.cf_model.item_width}):
            last = nn.Linear(10 * d, out)
            # All begin as the same words of no meaning; what is particular about an id comes in by training alone.
            nn.init.zeros_(last.weight)
            nn.init.normal_(last.bias, std=spread)
            self.maps[str(d)] = nn.Sequential(nn.Linear(d, 10 * d), nn.ReLU(), last)

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        soft: torch.Tensor,
        users: torch.Tensor,
        items: torch.Tensor,
        liked: torch.Tensor,
        histories: torch.Tensor | None = None,
        **about,
    ) -> torch.Tensor:
        """Embeddings of the prompt, soft tokens where `soft` [batch, length] has their numbers (reclingua/datasets/yes_no.py)."""
        if self.config.one_for_all:
            users, items, liked = users.clamp(max=1), items.clamp(max=1), liked.clamp(max=1)
        embedded = self.get_input_embeddings()(input_ids)
        tokens = [
            self._map("user", self.cf_model.user_vectors(users, histories, items)),
            self._map("item", self.cf_model.item_vectors(items)),
        ]
        if self.is_zero3 or int(soft.max()) > 2 * self.config.soft_tokens:
            liked = liked if liked.shape[1] else torch.zeros_like(items)[:, None]
            tokens.append(self._map("item", self.cf_model.item_vectors(liked)))
        rows, places = soft.nonzero(as_tuple=True)
        chosen = torch.cat(tokens, 1)[rows, soft[rows, places] - 1]
        return embedded.index_put((rows, places), chosen.to(embedded.dtype))

    def _map(self, whose: str, vectors: torch.Tensor) -> torch.Tensor:
        """[batch, width], or [batch, items, width] -> soft tokens [batch, soft_tokens (x items), hidden]."""
        mapped = self.maps[str(vectors.shape[-1])](self.normalize(whose, vectors))
        return mapped.reshape(len(vectors), -1, self.get_input_embeddings().embedding_dim)
