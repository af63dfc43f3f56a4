"""Open and check a preference dataset: who liked what, split by time, the ground of CoLLM, BinLLM and CoRA.

A preference dataset D is the folder <data_path>/D/ with train.parquet, valid.parquet, test.parquet and item.json, made
by `python -m data.prepare --task preference` or published by others. One row is one rating.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

PARTS = ("train", "valid", "test")
# What a row tells. Ids start at 1; 0 is padding. his: the items the user liked so far, oldest first. not_cold: whether
# train has both the user and the item.
COLUMNS = {
    "uid": pa.int32(),
    "iid": pa.int32(),
    "label": pa.int8(),
    "timestamp": pa.int64(),
    "his": pa.list_(pa.int32()),
    "not_cold": pa.int8(),
}

ROWS_PER_USER = 8  # of a sample


@dataclass(frozen=True)
class RatingsDataset:
    """The three parts as `datasets.Dataset`s with the columns above, and the items' texts."""

    name: str
    folder: Path
    parts: dict[str, Dataset]
    items: dict[str, dict]

    @property
    def num_users(self) -> int:
        """Rows of an embedding of users: the largest id and 1 for padding."""
        return 1 + max(int(to_numpy(part, "uid").max()) for part in self.parts.values())

    @property
    def num_items(self) -> int:
        """Rows of an embedding of items: the largest id and 1 for padding."""
        return 1 + max(int(item) for item in self.items)

    def sha256(self) -> str:
        """Fingerprint of the training ratings; a checkpoint keeps it and refuses other data."""
        digest = hashlib.sha256()
        for name in ("uid", "iid", "label"):
            digest.update(to_numpy(self.parts["train"], name).astype(np.int64).tobytes())
        return digest.hexdigest()


def to_numpy(part: Dataset, name: str) -> np.ndarray:
    """A column of numbers, [rows]."""
    return part.with_format("arrow")[:][name].to_numpy()


def liked_history(part: Dataset, length: int) -> np.ndarray:
    """int64 [rows, length]: the last `length` items of each history, oldest first, 0 in front of shorter ones."""
    lists = part.with_format("arrow")[:]["his"].combine_chunks()
    items, ends = lists.values.to_numpy(), lists.offsets.to_numpy()[1:]
    places = ends[:, None] + np.arange(-length, 0)
    there = places >= lists.offsets.to_numpy()[:-1, None]
    return np.where(there, items[np.where(there, places, 0)] if len(items) else 0, 0).astype(np.int64)


def sample_ratings(part: Dataset, count: int) -> Dataset:
    """About `count` rows: up to ROWS_PER_USER of each of as many users as that takes, all drawn at random, the same
    ones every time; all rows for 0. Rows of one user in plenty would make AUC a matter of a few users, single ones
    would leave UAUC without users."""
    if not 0 < count < len(part):
        return part
    draw = np.random.default_rng(0)
    users = to_numpy(part, "uid")
    order = draw.permutation(len(users))
    names, first = np.unique(users, return_inverse=True)
    place = draw.permutation(len(names))[first]  # of each row's user among the users
    order = order[np.argsort(place[order], kind="stable")]
    earlier = pd.Series(order).groupby(users[order]).cumcount()  # rows of the same user before each
    return part.select(np.sort(order[earlier < ROWS_PER_USER][:count]))


def open_ratings(data_path: str | Path, name: str) -> RatingsDataset:
    """Read preference dataset `name` below `data_path` and check every row.

    Raises:
        InputError: naming the file and the row (from 0) that is wrong.
    """
    folder = Path(data_path) / name
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such dataset folder; make it with python -m data.prepare --task preference, "
            "or see --data_path"
        )
    items = read_json(folder / "item.json", "item -> title and description")
    for item, record in items.items():
        if not item.isdecimal() or len(item) > 9 or item != str(int(item)) or item == "0":
            raise InputError(f"{folder / 'item.json'}: item {item[:50]!r} should be a number from 1 to 999999999")
        if not isinstance(record, dict) or not str(record.get("title") or "").strip():
            raise InputError(f"{folder / 'item.json'}: item {item!r} should be an object with a title")
    known = np.array([int(item) for item in items])
    parts = {part: _read_part(folder / f"{part}.parquet", known) for part in PARTS}
    return RatingsDataset(name, folder, parts, items)


def _read_part(path: Path, known: np.ndarray) -> Dataset:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with python -m data.prepare --task preference") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise InputError(f"{path}: has no rows")
    columns = {}
    for name, kind in COLUMNS.items():
        values = table.column(name)
        if values.null_count:
            raise InputError(f"{path}: row {pc.is_null(values).to_numpy().argmax()} has no {name}")
        try:
            columns[name] = values.cast(kind).combine_chunks()
        except pa.ArrowException as error:
            raise InputError(f"{path}: column {name!r} should be {kind}, not {values.type} ({error})") from None
    numbers = {name: columns[name].to_numpy(zero_copy_only=False) for name in COLUMNS if name != "his"}

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(f"{path}: row {row} has {what.format(**{k: v[row] for k, v in numbers.items()})}")

    for name in ("label", "not_cold"):
        refuse(~np.isin(numbers[name], (0, 1)), f"{name} {{{name}}}; it should be 0 or 1")
    refuse((numbers["uid"] < 1) | (numbers["uid"] > 999_999_999), "user {uid}; ids go from 1 to 999999999")
    refuse(~np.isin(numbers["iid"], known), "item {iid}, which is not in item.json")
    his = columns["his"]
    liked = pc.fill_null(his.flatten(), 0).to_numpy()
    rows_of_liked = np.repeat(np.arange(len(his)), pc.list_value_length(his).to_numpy(zero_copy_only=False))
    strange = np.zeros(len(his), bool)
    strange[rows_of_liked[~np.isin(liked, known)]] = True
    refuse(strange, "a history with an item that is not in item.json")
    if len(np.unique(numbers["label"])) == 1:
        raise InputError(f"{path}: all labels are {numbers['label'][0]}; AUC needs both 0 and 1")
    return Dataset(pa.table(columns))
