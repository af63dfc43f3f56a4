"""SASRec (arXiv 1808.09781): a causal transformer reads a user's items; its last output is the user's vector.

It scores ratings, trained by binary cross-entropy, or all items as the next one, trained by a softmax over them.
"""

import torch
from torch import nn
from torch.nn import functional as F

from reclingua.models.collaborative.base import CollaborativeConfig, CollaborativeModel


class SASRecConfig(CollaborativeConfig):
    """
    Args:
        max_length: number of liked items that are read, the last ones.
        num_layers, num_heads: shape of the transformer.
        dropout: on embeddings, attention weights and both outputs of a block.
        task: "ratings" or "next_item".
    """

    model_type = "sasrec"

    max_length: int = 25
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.5
    task: str = "ratings"


class Block(nn.Module):
    """Self-attention and a two-layer network, each with pre-normalisation and a residual connection."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        width = config.embedding_size
        self.heads, self.drop = config.num_heads, nn.Dropout(config.dropout)
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, queries: int) -> torch.Tensor:
        """Return the last `queries` of x [samples, length, width]; the mask is bool [samples, 1, queries, length]."""
        normed = self.attention_norm(x)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        key, value = self.key_value(normed).chunk(2, -1)
        attended = F.scaled_dot_product_attention(
            split(self.query(normed[:, -queries:])), split(key), split(value), mask, self.drop.p * self.training
        )
        x = x[:, -queries:] + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.drop(self.network(self.network_norm(x)))


class SASRec(CollaborativeModel):
    """SASRec over `max_length` liked items; users without any get the vector of an empty history."""

    config_class = SASRecConfig

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items, config.embedding_size, padding_idx=0)
        self.position = nn.Embedding(config.max_length, config.embedding_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embedding_size)
        self.post_init()

    @property
    def history_length(self) -> int:
        return self.config.max_length

    def user_vectors(self, users, histories=None, items=None) -> torch.Tensor:
        return self.outputs(histories, 1)[:, 0]

    def outputs(self, histories: torch.Tensor, last: int) -> torch.Tensor:
        """Return the outputs of the `last` positions of int64 [samples, length], float [samples, last, width]."""
        length = histories.shape[1]
        exists = histories > 0
        x = self.item_embedding(histories) + self.position.weight[-length:]
        x = F.dropout(x, self.config.dropout, self.training)
        # A position sees the items up to itself, and itself even if it is padding: no row is fully masked.
        own = torch.eye(length, dtype=torch.bool, device=x.device)
        mask = (exists[:, None, :] & torch.ones_like(own).tril() | own)[:, None]
        for block in self.blocks[:-1]:
            x = block(x, mask, length)
        return self.norm(self.blocks[-1](x, mask[:, :, -last:], last))  # the last block computes what is returned

    def next_item_loss(self, histories: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of each item after those before it, over all items (a full softmax).

        Args:
            histories: int64 [samples, length + 1], oldest first, 0 in front of shorter ones.
        """
        targets = histories[:, 1:]
        is_target = (targets > 0) & (histories[:, :-1] > 0)
        outputs = self.outputs(histories[:, :-1], targets.shape[1])[is_target]
        logits = outputs @ self.item_embedding.weight[1:].T
        return F.cross_entropy(logits, targets[is_target] - 1)

    def next_item_logits(self, histories: torch.Tensor) -> torch.Tensor:
        """Return the logits of all items but padding after int64 [samples, length], float [samples, num_items - 1]."""
        return self.outputs(histories, 1)[:, 0] @ self.item_embedding.weight[1:].T

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return self.item_embedding(items)
