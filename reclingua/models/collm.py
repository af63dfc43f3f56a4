"""CoLLM (arXiv 2310.19488): collaborative embeddings become soft tokens of the prompt.

A projector maps the embedding of a user or an item into the embedding space of the language model, which reads it like
a token (section 3.2). Soft prompts and personalised prompts are the same model with untrained embeddings, one for all
users and one for all items, or one for each.
"""

from typing import Any

import torch
from torch import nn

from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.yes_no import YesNoConfig, YesNoModel


class CoLLMConfig(YesNoConfig):
    """Config of a CoLLM.

    Args:
        soft_tokens: number of soft tokens for each id.
        one_for_all: all users share one embedding, and all items (soft prompt).
    """

    model_type = "recommender-collm"

    soft_tokens: int = 1
    one_for_all: bool = False


class CoLLM(YesNoModel):
    """Yes/No model with collaborative embeddings as soft tokens of the prompt."""

    config_class = CoLLMConfig
    cf_model: CollaborativeModel

    def build_projector(self) -> None:
        """Build one network for all embeddings of the same width: d -> 10 d -> ReLU -> soft_tokens x hidden."""
        super().build_projector()
        embedding: Any = self.get_input_embeddings()
        out, spread = self.config.soft_tokens * embedding.embedding_dim, embedding.weight.float().std().item()
        self.maps = nn.ModuleDict()
        for d in sorted({self.cf_model.user_width, self.cf_model.item_width}):
            last = nn.Linear(10 * d, out)
            # All ids start as the same random tokens; training makes them differ.
            nn.init.zeros_(last.weight)
            nn.init.normal_(last.bias, std=spread)
            self.maps[str(d)] = nn.Sequential(nn.Linear(d, 10 * d), nn.ReLU(), last)

    def embed_inputs(  # type: ignore[override]  # names the keys of the batch that it needs
        self,
        input_ids: torch.Tensor,
        soft: torch.Tensor,
        row: torch.Tensor,
        users: torch.Tensor,
        items: torch.Tensor,
        liked: torch.Tensor,
        num_soft: int,
        histories: torch.Tensor | None = None,
        **inputs,
    ) -> torch.Tensor:
        """Return the embeddings of trees, with soft tokens where `soft` [trees, length] has their numbers.

        The numbers are those of `reclingua.datasets.yes_no.YesNoDataset`; `row` [trees, length] tells whose they are,
        `num_soft` which is the largest.
        """
        if self.config.one_for_all:
            users, items, liked = users.clamp(max=1), items.clamp(max=1), liked.clamp(max=1)
        embedded = self.get_input_embeddings()(input_ids)
        tokens = [
            self._map("user", self.cf_model.user_vectors(users, histories, items)),
            self._map("item", self.cf_model.item_vectors(items)),
        ]
        if self.is_zero3 or num_soft > 2 * self.config.soft_tokens:
            liked = liked if liked.shape[1] else torch.zeros_like(items)[:, None]
            tokens.append(self._map("item", self.cf_model.item_vectors(liked)))
        places = soft.nonzero(as_tuple=True)
        values = torch.cat(tokens, 1)[row[places], soft[places] - 1]
        return embedded.index_put(places, values.to(embedded.dtype))

    def _map(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """Map [batch, width] or [batch, items, width] to soft tokens [batch, soft_tokens (x items), hidden]."""
        mapped = self.maps[str(vectors.shape[-1])](self.normalize(name, vectors))
        return mapped.reshape(len(vectors), -1, self.config.hidden_size)
