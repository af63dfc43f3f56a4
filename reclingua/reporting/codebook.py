"""Details of the semantic IDs for the report: items of each code, and a 2-D map of the items by first code."""

from collections import Counter
from glob import escape
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reclingua.datasets.interactions import InteractionDataset, other_part, read_embeddings
from reclingua.metrics.index import index_statistics
from reclingua.utils.errors import InputError

MAX_GROUPS = 10  # largest first codes, each with a colour and a table row of titles
MAX_POINTS = 5_000  # on the map


def codebook_details(
    dataset: InteractionDataset,
    folder: Path,
    embed: nn.Module,
    token_ids: dict[str, list[int]],
    popularity: Counter,
) -> dict:
    """Return what the report shows of the semantic IDs of `dataset`.

    Args:
        folder: folder of the index file; its first D.emb-*.npy with a row for each item is mapped.
        embed: input embeddings of the model, mapped if no such file exists (mean over the codes of an item).
        token_ids: item -> its codes as token ids.
        popularity: item -> interactions in training; a group is labelled with its most popular items.

    Returns:
        {"levels": for each level {"codes_used", "perplexity", "items": items of each code, most first},
        "groups": for the largest first codes {"code", "items", "titles"},
        "map": {"source": what was projected, "share": of the variance [2], "points": [[x, y], ...],
        "group": for each point its position in groups, or -1}}
    """
    items = dataset.item_ids
    codes = [dataset.index[item] for item in items]
    levels = index_statistics(dataset.index)["levels"]
    for position, level in enumerate(levels):
        counts = Counter(tokens[position] for tokens in codes if len(tokens) > position)
        level["items"] = sorted(counts.values(), reverse=True)

    largest = [code for code, _ in Counter(tokens[0] for tokens in codes).most_common(MAX_GROUPS)]
    groups = []
    for code in largest:
        members = [item for item, tokens in zip(items, codes, strict=True) if tokens[0] == code]
        titles = [dataset.title(item)[:60] for item in sorted(members, key=lambda item: -popularity[item])[:3]]
        groups.append({"code": code, "items": len(members), "titles": titles})

    vectors, source = _item_vectors(dataset, folder, embed, token_ids)
    points, share = project_to_plane(vectors)
    shown = np.arange(len(items))
    if len(items) > MAX_POINTS:
        shown = np.sort(np.random.default_rng(0).choice(len(items), MAX_POINTS, replace=False))
    group_of = {code: position for position, code in enumerate(largest)}
    return {
        "levels": levels,
        "groups": groups,
        "map": {
            "source": source,
            "share": share,
            "points": points[shown].round(4).tolist(),
            "group": [group_of.get(codes[row][0], -1) for row in shown],
        },
    }


def project_to_plane(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Project vectors [items, width] on their first two principal components.

    Returns:
        (float64 [items, 2], scaled so that the largest coordinate is 1; the components' shares of the variance [2]).
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # in ascending order
    axes = axes[:, -2:][:, ::-1]
    # The sign of an eigenvector is arbitrary: make its largest entry positive, or maps of equal data are mirrored.
    largest = axes[np.abs(axes).argmax(axis=0), [0, 1][: axes.shape[1]]]
    points = centred @ (axes * np.where(largest < 0, -1, 1))
    if points.shape[1] == 1:
        points = np.c_[points, np.zeros(len(points))]
    total = max(variances.sum(), np.finfo(float).tiny)
    shares = [float(max(0, share)) for share in (variances[-2:][::-1] / total)]
    return points / max(np.abs(points).max(), np.finfo(float).tiny), (shares + [0.0])[:2]


def _item_vectors(
    dataset: InteractionDataset, folder: Path, embed: nn.Module, token_ids: dict[str, list[int]]
) -> tuple[np.ndarray, str]:
    """Return (vectors [items, width], their source): an embedding file, or else mean code embeddings."""
    items = dataset.item_ids
    for file in sorted(folder.glob(f"{escape(dataset.name)}.emb-*.npy")):
        try:
            if not other_part(file, dataset) and len(vectors := read_embeddings(file)) == len(items):
                return vectors, file.name
        except InputError as error:  # the file has no part in the test
            print(f"the map of items leaves out {error}")
    return _code_vectors(embed, [token_ids[item] for item in items]), "the model's own embeddings of the codes"


@torch.no_grad()
def _code_vectors(embed: nn.Module, token_ids: list[list[int]]) -> np.ndarray:
    """Return the mean embedding of each item's codes, float32 [items, width]."""
    tokens = torch.tensor(sorted({token for ids in token_ids for token in ids}))
    rows = embed(tokens.to(next(embed.parameters()).device)).float().cpu().numpy()
    return np.stack([rows[np.searchsorted(tokens.numpy(), ids)].mean(axis=0) for ids in token_ids])
