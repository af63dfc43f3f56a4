"""Semantic IDs for the new items of a dataset, beside those of an index whose items keep theirs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from index.codes import LETTERS
from reclingua.datasets.interactions import InteractionDataset, read_index
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.provenance import file_sha256, read_record, record_path


def open_index(path: Path, dataset: InteractionDataset, force: bool) -> dict[str, list[str]]:
    """Return item -> code tokens of the index to extend.

    Raises:
        InputError: an item of the index is not in the dataset, or, unless `force`, has another text there than when
            the index was made, so that its id can stand for another item.
    """
    index = read_index(path)
    if missing := next((item for item in index if item not in dataset.items), None):
        raise InputError(
            f"{path}: item {missing!r} is not in {dataset.name}.item.json; keep items that left in that file, so that "
            "no other item gets their semantic IDs"
        )
    stored = (read_record(path) or {}).get("texts")
    if stored is None:
        print(f"{path} does not state its items: whether the ids of {dataset.folder} are the same cannot be checked")
    known = replace(dataset, items={item: texts for item, texts in dataset.items.items() if item in index})
    if stored not in (None, known.sha256("texts")) and not force:
        raise InputError(
            f"{path}: its items have other texts in {dataset.folder} now; if their ids stand for the same items, give "
            "--force, else make another index"
        )
    return index


def find_rqvae(path: Path, rqvae: Path | None) -> Path:
    """Return the folder of the RQ-VAE that the index at `path` was made with.

    Args:
        rqvae: folder, overrides the one in the record of the index.

    Raises:
        InputError: the folder is unknown, or has another RQ-VAE.
    """
    record = read_record(path) or {}
    if rqvae is None:
        flags = read_json(record_path(path), "the record of an index").get("arguments") if record else None
        if not isinstance(flags, dict) or not flags.get("rqvae"):
            raise InputError(f"{path}: does not state its RQ-VAE; name the folder by --rqvae")
        rqvae = Path(flags["rqvae"])
    weights = rqvae / "model.safetensors"
    if weights.exists() and record.get("rqvae_sha256") not in (None, file_sha256(weights)):
        raise InputError(f"{rqvae}: is not the RQ-VAE that {path} was made with; see --rqvae")
    return rqvae


def parse_codes(path: Path, index: Mapping[str, list[str]], sizes: Sequence[int]) -> np.ndarray:
    """Return the codes int64 [items, levels] of an index; InputError unless they are those of codebooks of `sizes`."""
    pattern = re.compile("".join(rf"<{letter}_(0|[1-9]\d*)>" for letter in LETTERS[: len(sizes)]))
    codes = np.empty((len(index), len(sizes)), dtype=np.int64)
    for row, (item, tokens) in enumerate(index.items()):
        match = pattern.fullmatch("".join(tokens)) if len(tokens) == len(sizes) else None
        if not match or any(int(code) >= size for code, size in zip(match.groups(), sizes, strict=True)):
            raise InputError(
                f"{path}: item {item!r} has {''.join(tokens)}, which is no semantic ID of an RQ-VAE with "
                f"{', '.join(map(str, sizes))} codes; see --rqvae"
            )
        codes[row] = [int(code) for code in match.groups()]
    return codes
