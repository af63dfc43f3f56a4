"""Hashed matrix factorisation (BinLLM): users and items are binary codes, their dot product is the score."""

import torch
from torch import nn

from reclingua.models.collaborative.base import CollaborativeConfig, CollaborativeModel


class HashedMFConfig(CollaborativeConfig):
    """
    Args:
        bits: length of a code.
        logit_scale: factor of the dot product of two codes, -bits to bits, within the loss. At 1, as published, the
            loss of a wrong sign is so large that test AUC on ml-1m is .06 lower than at 0.1.
        beta_step: increase of `beta`, the share of coordinates that are signs in training, with every epoch.
    """

    model_type = "hash"

    bits: int = 32
    logit_scale: float = 0.1
    beta_step: float = 0.02


class HashedMF(CollaborativeModel):
    """Hashed MF: embedding -> linear -> tanh -> sign; in training with straight-through gradients."""

    config_class = HashedMFConfig
    beta = 1.0  # probability that a coordinate is its sign in training; evaluation uses signs only

    def __init__(self, config: HashedMFConfig):
        super().__init__(config)
        self.user_embedding = nn.Embedding(config.num_users, config.embedding_size, padding_idx=0)
        self.item_embedding = nn.Embedding(config.num_items, config.embedding_size, padding_idx=0)
        self.logit_scale = config.logit_scale
        self.hash = nn.Linear(config.embedding_size, config.bits)
        self.post_init()

    @property
    def user_width(self) -> int:
        return self.config.bits

    @property
    def item_width(self) -> int:
        return self.config.bits

    @property
    def warmup_epochs(self) -> int:
        return round(1 / self.config.beta_step)

    def begin_epoch(self, epoch: int) -> None:
        self.beta = min(1.0, epoch * self.config.beta_step)

    def user_codes(self, users: torch.Tensor) -> torch.Tensor:
        """Return the bits, bool [samples, bits]."""
        return self.hash(self.user_embedding(users)) > 0

    def item_codes(self, items: torch.Tensor) -> torch.Tensor:
        """Return the bits, bool [samples, bits]."""
        return self.hash(self.item_embedding(items)) > 0

    def user_vectors(self, users, histories=None, items=None) -> torch.Tensor:
        return self._signs(self.user_embedding, users)

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        return self._signs(self.item_embedding, items)

    def _signs(self, embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Return +1 and -1, [..., bits], and zeros for the padding id."""
        smooth = torch.tanh(self.hash(embedding(ids)))
        signs = torch.where(smooth > 0, 1.0, -1.0)
        if self.training:
            signs = smooth + (signs - smooth).detach()
            signs = torch.where(torch.rand_like(smooth) < self.beta, signs, smooth)
        return signs * (ids > 0)[..., None]
