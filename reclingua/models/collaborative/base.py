"""What every collaborative model offers: a score for training, and the vectors that an LLM method may ask for."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class CollaborativeConfig(PreTrainedConfig):
    """What every collaborative model's config tells.

    Args:
        num_users, num_items: rows of the embeddings: largest id + 1, since 0 is padding.
        embedding_size: width of an embedding.
        initializer_range: standard deviation of the embeddings at first. Small: ids that train never saw then score
            close to 0 from the beginning, instead of at random until weight decay has worn them down.
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
    """`logits` float [samples]; `loss`, binary cross-entropy, where labels were given."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CollaborativeModel(PreTrainedModel):
    """Scores pairs of user and item; a subclass says where a user's vector comes from, and may say how it scores.

    Ids are int64 and start at 1; the vector of the padding id 0 is all zeros. Histories are int64
    [samples, history_length], oldest first, with 0 in front of shorter ones.
    """

    config_class = CollaborativeConfig
    main_input_name = "users"
    logit_scale = 1.0  # of the scores within the loss; which of two scores is higher is not up to it
    warmup_epochs = 0  # of training, before which no state is worth keeping

    def learn_graph(self, users: torch.Tensor, items: torch.Tensor) -> None:
        """Called before training with the liked pairs of train, int64 [pairs] each: what a graph model reads."""

    def begin_epoch(self, epoch: int) -> None:
        """Called by training before each epoch, from 0."""

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
        """How many liked items the model reads; 0: none, `histories` may be None."""
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
        self, users: torch.Tensor, histories: torch.Tensor | None, items: torch.Tensor | None
    ) -> torch.Tensor:
        """Users [samples], what they liked before, and the items in question [samples] -> [samples, user_width]."""
        raise NotImplementedError

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        """Items, or a history's items, of any shape -> [..., item_width]."""
        raise NotImplementedError

    def score(self, users: torch.Tensor, items: torch.Tensor, histories: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [samples] that the users like the items: here the dot product of their vectors."""
        return torch.linalg.vecdot(self.user_vectors(users, histories, items), self.item_vectors(items))

    def forward(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        histories: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CollaborativeOutput:
        """Users, items int64 [samples], histories int64 [samples, history_length], labels float [samples], 0 or 1."""
        logits = self.score(users, items, histories)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(self.log_odds(logits), labels)
        return CollaborativeOutput(loss=loss, logits=logits)

    def log_odds(self, logits: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """Of logits those that the loss sees; the sigmoid of these is the probability that the user likes the item."""
        return logits * self.logit_scale
