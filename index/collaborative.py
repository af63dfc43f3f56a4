"""Collaborative part of item embeddings: an SVD of training interactions, into which new items are folded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD

from reclingua.datasets.interactions import InteractionDataset
from reclingua.utils.errors import InputError

NEIGHBOURS = 10  # items whose interaction part an item without interactions gets


def interaction_matrix(dataset: InteractionDataset, items: Sequence[str], users: Sequence[str]) -> csr_matrix:
    """Return the training interactions of `items` and `users`, float64 [items, users].

    The column of a user has unit length over all items of the dataset. Users without a history have a column of 0.
    """
    row_of = {item: row for row, item in enumerate(items)}
    entries = [
        (row_of[item], column, len(history) ** -0.5)
        for column, user in enumerate(users)
        for history in [dataset.train_history(user) if user in dataset.histories else []]
        for item in set(history)
        if item in row_of
    ]
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((values, (rows, columns)), shape=(len(items), len(users)), dtype=np.float64)


@dataclass(frozen=True)
class JoinedEmbedding:
    """Concatenation of text and interaction vectors, as it was fitted to the items of a dataset.

    Items with the same users come out close. LETTER (arXiv 2405.07314) aligns semantic IDs with collaborative
    embeddings by a contrastive loss; this is the idea in its simplest form.

    Args:
        users: ids of the columns of the item-user matrix.
        components: float32 [width, users], right singular vectors: the matrix times their transpose are the item
            vectors.
        text_mean, interaction_mean: float32 [dim] and [width], centres of both parts.
        weight: length of the interaction part, 0 to 1; the text part has length 1 - weight.
    """

    users: list[str]
    components: np.ndarray
    text_mean: np.ndarray
    interaction_mean: np.ndarray
    weight: float

    @classmethod
    def fit(
        cls, dataset: InteractionDataset, text: np.ndarray, width: int, weight: float, seed: int = 0
    ) -> tuple[Self, np.ndarray]:
        """Fit the SVD and the centres; return them, and the embeddings float32 [items, dim + width].

        Args:
            text: float32 [items, dim], row i = item i of `dataset.item_ids`.
        """
        users = list(dataset.histories)
        svd = TruncatedSVD(width, n_iter=10, random_state=seed)
        vectors = svd.fit_transform(interaction_matrix(dataset, dataset.item_ids, users)).astype(np.float32)
        means = text.mean(axis=0), vectors.mean(axis=0)
        joined = cls(users, svd.components_.astype(np.float32), *means, weight)
        return joined, joined._join(text, vectors)

    def embed(
        self, dataset: InteractionDataset, items: Sequence[str], text: np.ndarray, known: np.ndarray
    ) -> np.ndarray:
        """Embed new items by the frozen SVD and centres, float32 [items, dim + width].

        Items are folded in by their training interactions with the known users. An item without any gets the
        interaction part of its NEIGHBOURS in text: their mean direction.

        Args:
            text: float32 [items, dim].
            known: float32 [known items, dim + width], the embeddings that the fit returned.
        """
        matrix, dim = interaction_matrix(dataset, items, self.users), text.shape[1]
        embeddings = self._join(text, (matrix @ self.components.T).astype(np.float32))
        is_isolated = matrix.getnnz(axis=1) == 0
        nearest = np.argsort(-embeddings[is_isolated, :dim] @ known[:, :dim].T, axis=1, kind="stable")[:, :NEIGHBOURS]
        embeddings[is_isolated, dim:] = self.weight * _normalized(known[nearest, dim:].mean(axis=1))
        return embeddings

    def _join(self, text: np.ndarray, interactions: np.ndarray) -> np.ndarray:
        parts = (1 - self.weight) * _normalized(text - self.text_mean)
        return np.concatenate([parts, self.weight * _normalized(interactions - self.interaction_mean)], axis=1).astype(
            np.float32
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        users = np.frombuffer(json.dumps(self.users).encode(), dtype=np.uint8)
        tensors = {"components": self.components, "text_mean": self.text_mean}
        tensors |= {"interaction_mean": self.interaction_mean, "weight": np.array([self.weight])}
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()} | {"users": users}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; InputError if the file does not exist or contains something else."""
        try:
            tensors = load_file(path)
            users, weight = json.loads(tensors.pop("users").tobytes()), float(tensors.pop("weight")[0])
            joined = cls(users, weight=weight, **tensors)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; python -m index.embed writes it with --collab_weight") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: contains no SVD of index.embed ({error})") from None
        if joined.components.shape != (len(joined.interaction_mean), len(joined.users)):
            raise InputError(f"{path}: its SVD does not fit its users; run python -m index.embed again")
        return joined


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
