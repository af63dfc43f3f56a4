"""What a report shows of an index: how many items each code has, and the items on a plane, by their first code."""

from collections import Counter
from glob import escape
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reclingua.datasets.interactions import RecDataset, read_embeddings
from reclingua.metrics.index import index_statistics

GROUPS = 10  # largest first codes that get a colour and a line with titles
POINTS = 5_000  # on the map


def describe(
    dataset: RecDataset,
    folder: Path,
    embed: nn.Module,
    token_ids: dict[str, list[int]],
    popularity: Counter,
) -> dict:
    """The index of `dataset` as the report shows it.

    Args:
        folder: that of the index; the first D.emb-*.npy of it with a row for each item gives the map.
        embed: the model's input embeddings, for the map where there is no such file: the mean of an item's codes.
        token_ids: item -> its codes as token ids.
        popularity: item -> interactions in training; the most popular items name their group.

    Returns:
        {"levels": codes used and perplexity of each, and the items of each code, most first,
        "groups": of the largest first codes {"code", "items", "titles"},
        "map": {"of", "share": of variance [2], "points": [[x, y], ...], "group": place in groups or -1 [points]}}
    """
    items = dataset.item_ids
    codes = [dataset.index[item] for item in items]
    levels = index_statistics(dataset.index)["levels"]
    for at, level in enumerate(levels):
        counts = Counter(tokens[at] for tokens in codes if len(tokens) > at)
        level["items"] = sorted(counts.values(), reverse=True)

    largest = [code for code, _ in Counter(tokens[0] for tokens in codes).most_common(GROUPS)]
    groups = []
    for code in largest:
        members = [item for item, tokens in zip(items, codes, strict=True) if tokens[0] == code]
        titles = [dataset.title(item)[:60] for item in sorted(members, key=lambda item: -popularity[item])[:3]]
        groups.append({"code": code, "items": len(members), "titles": titles})

    files = sorted(folder.glob(f"{escape(dataset.name)}.emb-*.npy"))
    vectors, of = None, "the model's own embeddings of the codes"
    for file in files:
        if len(found := read_embeddings(file)) == len(items):
            vectors, of = found, file.name
            break
    if vectors is None:
        vectors = _code_vectors(embed, [token_ids[item] for item in items])
    points, share = plane(vectors)
    shown = np.arange(len(items))
    if len(items) > POINTS:
        shown = np.sort(np.random.default_rng(0).choice(len(items), POINTS, replace=False))
    place = {code: at for at, code in enumerate(largest)}
    return {
        "levels": levels,
        "groups": groups,
        "map": {
            "of": of,
            "share": share,
            "points": points[shown].round(4).tolist(),
            "group": [place.get(codes[at][0], -1) for at in shown],
        },
    }


def plane(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(float64 [items, 2] on the two principal components, the largest place 1; their shares of the variance [2])."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, -2:][:, ::-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1][: axes.shape[1]]] < 0, -1, 1)  # not up to chance
    points = centred @ axes
    if points.shape[1] == 1:
        points = np.c_[points, np.zeros(len(points))]
    total = max(variances.sum(), np.finfo(float).tiny)
    shares = [float(max(0, share)) for share in (variances[-2:][::-1] / total)]
    return points / max(np.abs(points).max(), np.finfo(float).tiny), (shares + [0.0])[:2]


@torch.no_grad()
def _code_vectors(embed: nn.Module, token_ids: list[list[int]]) -> np.ndarray:
    """float32 [items, width]: the mean embedding of each item's codes."""
    tokens = torch.tensor(sorted({token for ids in token_ids for token in ids}))
    rows = embed(tokens.to(next(embed.parameters()).device)).float().cpu().numpy()
    return np.stack([rows[np.searchsorted(tokens.numpy(), ids)].mean(axis=0) for ids in token_ids])
