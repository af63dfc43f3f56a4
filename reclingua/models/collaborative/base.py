"""Base class of the collaborative models: scores for training, and vectors of users and items for LLM methods."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

Values = TypeVar("Values", torch.Tensor, np.ndarray)


class CollaborativeConfig(PreTrainedConfig):
    """Config of a collaborative model.

    Args:
        num_users, num_items: rows of the embeddings: largest id + 1, since 0 is padding.
        embedding_size: width of an embedding.
        initializer_range: standard deviation of initial embeddings. It is small, so that ids without training rows
            score close to 0 from the start, instead of at random until weight decay has shrunk them.
        dataset, dataset_sha256: name and `RatingsDataset.sha256()` of what the model was trained on.
    """

    num_users: int = 2
    num_items: int = 2
    embedding_size: int = 64
    initializer_range: float = 0.01
    dataset: str = ""
    dataset_sha256: str = ""


@dataclass
class CollaborativeOutput(ModelOutput):
    """Output with `logits`, float [samples], and `loss`, binary cross-entropy, if there are labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CollaborativeModel(PreTrainedModel):
    """Model that scores pairs of user and item; subclasses define the vectors, and can define the score.

    Ids are int64 and start at 1; the vector of the padding id 0 is all zeros. Histories are int64
    [samples, history_length], oldest first, with 0 in front of shorter ones.
    """

    config_class = CollaborativeConfig
    main_input_name = "users"
    logit_scale = 1.0  # factor of the scores within the loss; it changes no ranking

    @property
    def warmup_epochs(self) -> int:
        """Training epochs before the first one whose weights can be the best."""
        return 0

    def set_graph(self, users: torch.Tensor, items: torch.Tensor) -> None:
        """Set the graph of a graph model, called before training with the liked pairs of train, int64 [pairs] each."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, from 0; called by training."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def history_length(self) -> int:
        """Number of liked items that the model reads; 0: `histories` can be None."""
        return 0

    @property
    def user_width(self) -> int:
        """Width of `user_vectors`."""
        return self.config.embedding_size

    @property
    def item_width(self) -> int:
        """Width of `item_vectors`."""
        return self.config.embedding_size

    def user_vectors(
        self, users: torch.Tensor, histories: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the vectors of users [samples, user_width], given their histories and the items to score."""
        raise NotImplementedError

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors of items of any shape [...], float [..., item_width]."""
        raise NotImplementedError

    def score(self, users: torch.Tensor, items: torch.Tensor, histories: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [samples] that users like items, by default the dot product of their vectors."""
        return torch.linalg.vecdot(self.user_vectors(users, histories, items), self.item_vectors(items))

    def forward(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CollaborativeOutput:
        """Score users and items, int64 [samples], with histories int64 [samples, history_length]; labels float."""
        logits = self.score(users, items, histories)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(self.log_odds(logits), labels)
        return CollaborativeOutput(loss=loss, logits=logits)

    def log_odds(self, logits: Values) -> Values:
        """Return the logits within the loss; their sigmoid is the probability that the user likes the item."""
        return logits * self.logit_scale
