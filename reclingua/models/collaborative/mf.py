"""Matrix factorisation: the score is the dot product of a user's and an item's embedding."""

import torch
from torch import nn

from reclingua.models.collaborative.base import CollaborativeConfig, CollaborativeModel


class MFConfig(CollaborativeConfig):
    """MF has nothing beside the embeddings."""

    model_type = "mf"


class MF(CollaborativeModel):
    """Embeddings of users and items."""

    config_class = MFConfig

    def __init__(self, config: MFConfig):
        super().__init__(config)
        self.user_embedding = nn.Embedding(config.num_users, config.embedding_size, padding_idx=0)
        self.item_embedding = nn.Embedding(config.num_items, config.embedding_size, padding_idx=0)
        self.post_init()

    def user_vectors(self, users, histories=None, items=None) -> torch.Tensor:
        return self.user_embedding(users)

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return self.item_embedding(items)
