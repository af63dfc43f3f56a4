"""SASRec on next items, trained by a softmax over all items (`pretrain.py --task next_item`): a baseline."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from tqdm import tqdm

from reclingua.baselines import valid_parts
from reclingua.baselines.base import Baseline
from reclingua.baselines.histories import Catalogue, Histories
from reclingua.baselines.selection import rank_targets
from reclingua.datasets.interactions import InteractionDataset
from reclingua.metrics import metrics_of_ranks
from reclingua.models.collaborative import load_collaborative, weights_sha256
from reclingua.models.collaborative.sasrec import SASRec, SASRecConfig
from reclingua.utils.errors import InputError

MAX_LENGTH = 50  # items of a history that are read
CHUNK = 512  # histories that are scored at a time


def pad_histories(histories: Sequence[np.ndarray], length: int) -> torch.Tensor:
    """Return the last `length` items of each history, int64 [histories, length], 0 in front of shorter ones."""
    padded = np.zeros((len(histories), length), np.int64)
    for row, items in enumerate(histories):
        items = items[-length:]
        padded[row, length - len(items) :] = items
    return torch.from_numpy(padded)


class NextItemSASRec(Baseline):
    """A trained SASRec, whose id of an item is its place in `InteractionDataset.item_ids`, from 1.

    Args:
        ids: id of each item of the catalogue, int64 [items].
    """

    name = "sasrec"

    def __init__(self, model: SASRec, ids: np.ndarray):
        super().__init__({"sha256": weights_sha256(model)[:16]})
        self.model, self.ids = model, ids

    @classmethod
    def from_pretrained(cls, folder: Path, dataset: InteractionDataset, catalogue: Catalogue) -> Self:
        """Load the model in `folder`; InputError unless it was trained on the histories of `dataset`."""
        model = load_collaborative(folder)
        if not isinstance(model, SASRec) or model.config.task != "next_item":
            raise InputError(f"{folder}: scores ratings; next items need pretrain.py --model sasrec --task next_item")
        if model.config.dataset_sha256 != dataset.sha256("histories"):
            raise InputError(
                f"{folder}: was trained on other histories ({model.config.dataset}) than those of {dataset.folder}"
            )
        return cls(model, item_places(dataset, catalogue))

    def fit(self, train: Histories) -> Self:
        return self  # it was trained before

    @torch.no_grad()
    def scores(self, histories: Histories) -> np.ndarray:
        was_training = self.model.training
        self.model.eval()
        ids = np.split(self.ids[histories.items], histories.ends[:-1])
        logits = []
        for start in range(0, len(ids), CHUNK):
            inputs = pad_histories(ids[start : start + CHUNK], self.model.config.max_length).to(self.model.device)
            logits.append(self.model.next_item_logits(inputs).float().cpu().numpy())
        self.model.train(was_training)
        return np.concatenate(logits)[:, self.ids - 1]


def item_places(dataset: InteractionDataset, catalogue: Catalogue) -> np.ndarray:
    """Return the place of each item of the catalogue in `dataset.item_ids`, from 1, int64 [items]."""
    places = {item: place for place, item in enumerate(dataset.item_ids, start=1)}
    return np.array([places[item] for item in catalogue.items])


def train_sasrec(
    dataset: InteractionDataset,
    excludes_seen: bool,
    *,
    embedding_size: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    epochs: int,
    patience: int,
    seed: int,
) -> tuple[NextItemSASRec, list[dict]]:
    """Train SASRec on the training histories; return it in its best state on valid, and the curve by epoch.

    Args:
        excludes_seen: whether the items of a history are no candidates after it on valid.
        batch_size: windows of histories in a batch.
        patience: epochs without a better NDCG@10 on valid before training ends.

    Raises:
        InputError: no user has two training interactions; the loss is not a finite number.
    """
    torch.manual_seed(seed)
    draw, catalogue = np.random.default_rng(seed), Catalogue(dataset)
    config = SASRecConfig(
        num_items=len(catalogue) + 1,
        embedding_size=embedding_size,
        max_length=MAX_LENGTH,
        initializer_range=0.02,
        dataset=dataset.name,
        dataset_sha256=dataset.sha256("histories"),
        task="next_item",
    )
    model = SASRec(config)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    baseline = NextItemSASRec(model, item_places(dataset, catalogue))
    train = np.split(baseline.ids[catalogue.train.items], catalogue.train.ends[:-1])
    valid, targets = valid_parts(dataset, catalogue)
    if not any(len(items) > 1 for items in train):
        raise InputError(f"{dataset.folder}: no user has two training interactions, so there is nothing to learn")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    curve: list[dict] = []
    best: dict = {}
    for epoch in tqdm(range(1, epochs + 1), desc="sasrec", unit="epoch", disable=None, leave=False):
        windows = [window for items in train for window in draw_windows(items, draw)]
        order, total = draw.permutation(len(windows)), 0.0
        model.train()
        for rows in np.array_split(order, -(-len(order) // batch_size)):
            loss = model.next_item_loss(pad_histories([windows[row] for row in rows], MAX_LENGTH + 1).to(model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        if not math.isfinite(total):
            raise InputError(f"the loss is {total} in epoch {epoch}; lower --learning_rate")
        ranks = rank_targets(baseline, valid, targets, valid if excludes_seen else None)
        metrics = metrics_of_ranks(ranks, [("hit", 10), ("ndcg", 10)])
        curve.append({"epoch": epoch, "loss": total / len(order)} | metrics)
        if not best or curve[-1]["ndcg@10"] > best["ndcg@10"]:
            best = curve[-1] | {"state": copy.deepcopy(model.state_dict())}
        elif epoch - best["epoch"] >= patience:
            break
    model.load_state_dict(best["state"])
    model.eval()
    return baseline, curve


def draw_windows(items: np.ndarray, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield windows of up to MAX_LENGTH + 1 items that tile a history, so that each item but the first is a target.

    The first window ends at a random place of a long history: over the epochs an item has histories of many lengths.
    """
    end = len(items)
    if end > MAX_LENGTH + 1:
        end = int(draw.integers(2, MAX_LENGTH + 2))
    start = 0
    while end - start > 1:
        yield items[start:end]
        start, end = end - 1, min(end + MAX_LENGTH, len(items))
