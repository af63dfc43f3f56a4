"""DIN (arXiv 1706.06978): the item in question weighs the user's liked items; a network scores what comes of it."""

import torch
from torch import nn

from reclingua.models.collaborative.base import CollaborativeConfig, CollaborativeModel


class DINConfig(CollaborativeConfig):
    """
    Args:
        max_length: number of liked items that are read, the last ones.
        attention_sizes: hidden widths of the attention network.
        hidden_sizes: hidden widths of the scoring network.
        dropout: of the scoring network.
    """

    model_type = "din"

    max_length: int = 10
    attention_sizes: tuple[int, ...] = (80, 40)
    hidden_sizes: tuple[int, ...] = (200, 80)
    dropout: float = 0.2


def network(widths: list[int], dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers with PReLU between them, and one output."""
    layers: list[nn.Module] = []
    for width, following in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(width, following), nn.PReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


class DIN(CollaborativeModel):
    """DIN: a user's vector depends on the item to score; it is item, attended history and user, concatenated."""

    config_class = DINConfig

    def __init__(self, config: DINConfig):
        super().__init__(config)
        width = config.embedding_size
        self.user_embedding = nn.Embedding(config.num_users, width, padding_idx=0)
        self.item_embedding = nn.Embedding(config.num_items, width, padding_idx=0)
        self.attention = network([4 * width, *config.attention_sizes])
        self.scorer = network([3 * width, *config.hidden_sizes], config.dropout)
        self.post_init()

    @property
    def history_length(self) -> int:
        return self.config.max_length

    @property
    def user_width(self) -> int:
        return 3 * self.config.embedding_size

    def user_vectors(self, users, histories=None, items=None) -> torch.Tensor:
        item = self.item_embedding(items)
        liked = self.item_embedding(histories)
        target = item[:, None].expand_as(liked)
        weight = self.attention(torch.cat([target, liked, target - liked, target * liked], -1))
        # The weights are not normalised (section 4.3): the strength of the user's interest counts as well.
        attended = (weight * liked * (histories > 0)[..., None]).sum(1)
        return torch.cat([item, attended, self.user_embedding(users)], -1)

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return self.item_embedding(items)

    def score(self, users, items, histories=None) -> torch.Tensor:
        return self.scorer(self.user_vectors(users, histories, items)).squeeze(-1)
