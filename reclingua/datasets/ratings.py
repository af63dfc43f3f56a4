"""Ratings datasets: read and check who liked what, split by time, the data of the Yes/No methods.

A ratings dataset D is the folder <data_path>/D/ with train.parquet, valid.parquet, test.parquet and item.json, made
by `python -m data.prepare --task preference` or published with CoLLM, BinLLM or CoRA. A row is one rating.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from reclingua.datasets.formats import conversion_hint
from reclingua.datasets.item_texts import complete_titles, describe_untitled
from reclingua.utils.errors import InputError
from reclingua.utils.files import check_complete, read_json
from reclingua.utils.provenance import fingerprint

PARTS = ("train", "valid", "test")
# Columns of a row. Ids start at 1; 0 is padding. his: the items that the user has liked so far, oldest first.
# not_cold: whether train has both the user and the item.
COLUMNS = {
    "uid": pa.int32(),
    "iid": pa.int32(),
    "label": pa.int8(),
    "timestamp": pa.int64(),
    "his": pa.list_(pa.int32()),
    "not_cold": pa.int8(),
}

ROWS_PER_USER = 8  # in `sample_ratings`


@dataclass(frozen=True)
class RatingsDataset:
    """Ratings split into train, valid and test, and item texts.

    Args:
        parts: "train", "valid", "test" -> rows with COLUMNS.
        items: item id -> texts by key; every item has a title.
        remarks: sentences on items without a title of their own.
    """

    name: str
    folder: Path
    parts: dict[str, Dataset]
    items: dict[str, dict]
    remarks: tuple[str, ...] = ()

    @property
    def num_users(self) -> int:
        """Rows of a user embedding: the largest id, and 1 for padding."""
        return 1 + max(int(to_numpy(part, "uid").max()) for part in self.parts.values())

    @property
    def num_items(self) -> int:
        """Rows of an item embedding: the largest id, and 1 for padding."""
        return 1 + max(int(item) for item in self.items)

    def sha256(self) -> str:
        """Return the fingerprint of the training ratings, which a checkpoint stores to refuse other data."""
        digest = hashlib.sha256()
        for name in ("uid", "iid", "label"):
            digest.update(to_numpy(self.parts["train"], name).astype(np.int64).tobytes())
        return digest.hexdigest()

    def items_sha256(self) -> str:
        """Return the fingerprint of the items and their titles."""
        return fingerprint({item: str(texts.get("title")) for item, texts in self.items.items()})

    def num_trained(self, part: Dataset) -> int:
        """Return how many rows of a part are of a user and an item that train has together."""
        pairs = [
            to_numpy(rows, "uid").astype(np.int64) << 32 | to_numpy(rows, "iid")
            for rows in (part, self.parts["train"])
        ]
        return int(np.isin(*pairs).sum())


def to_numpy(part: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers, [rows]."""
    return part.with_format("arrow")[:][name].to_numpy()


def history_items(part: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the liked items of all rows, one row after another, int64 [all], and where they begin, [rows + 1]."""
    lists = part.with_format("arrow")[:]["his"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]], offsets - offsets[0]


def liked_history(part: Dataset, length: int) -> np.ndarray:
    """Return the last `length` items of each history, int64 [rows, length], oldest first, 0 in front of fewer."""
    items, offsets = history_items(part)
    positions = offsets[1:, None] + np.arange(-length, 0)
    exists = positions >= offsets[:-1, None]
    return np.where(exists, items[np.where(exists, positions, 0)] if len(items) else 0, 0)


def sample_ratings(part: Dataset, count: int) -> Dataset:
    """Return about `count` random rows, the same at every call; all rows for 0.

    Users are drawn at random, with up to ROWS_PER_USER rows each: more rows a user would reduce AUC to a few users,
    single rows would leave UAUC without users.
    """
    if not 0 < count < len(part):
        return part
    generator = np.random.default_rng(0)
    users = to_numpy(part, "uid")
    order = generator.permutation(len(users))
    user_ids, user_of_row = np.unique(users, return_inverse=True)
    rank = generator.permutation(len(user_ids))[user_of_row]
    order = order[np.argsort(rank[order], kind="stable")]
    earlier = pd.Series(order).groupby(users[order]).cumcount()  # rows of the same user before each row
    return part.select(np.sort(order[earlier < ROWS_PER_USER][:count]))


def open_ratings(data_path: str | Path, name: str) -> RatingsDataset:
    """Read and check ratings dataset `name` below `data_path`.

    Raises:
        InputError: names the file and the invalid row (from 0).
    """
    folder = Path(data_path) / name
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such dataset folder; make it with python -m data.prepare --task preference, "
            "or see --data_path"
        )
    check_complete(folder)
    missing = next((file for file in ("item.json", "train.parquet") if not (folder / file).is_file()), None)
    if missing and (hint := conversion_hint(folder, name)):
        raise InputError(f"{folder / missing}: no such file; {hint}")
    items = read_items(folder / "item.json")
    untitled = complete_titles(items)
    item_ids = np.array([int(item) for item in items])
    tables = {part: _read_part(folder / f"{part}.parquet", item_ids) for part in PARTS}
    if not all("not_cold" in table.column_names for table in tables.values()):
        tables = mark_warm(tables)
    parts = {part: Dataset(table.select(list(COLUMNS))) for part, table in tables.items()}
    remark = describe_untitled(untitled.values())
    return RatingsDataset(name, folder, parts, items, (remark,) if remark else ())


def read_items(path: Path) -> dict[str, dict]:
    """Read item -> texts by key from item.json, as they are; InputError if an id is no number from 1 to 999999999."""
    items = read_json(path, "item -> title and description")
    for item, record in items.items():
        if not item.isdecimal() or len(item) > 9 or item != str(int(item)) or item == "0":
            raise InputError(f"{path}: item {item[:50]!r} should be a number from 1 to 999999999")
        if not isinstance(record, dict):
            raise InputError(f"{path}: item {item!r} should be an object with a title")
    return items


def mark_warm(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Replace or add the column `not_cold`: whether train has both the user and the item of a row."""
    train = tables["train"]
    marked = {}
    for part, table in tables.items():
        warm = pc.and_(*(pc.is_in(table[name], train[name].combine_chunks()) for name in ("uid", "iid")))
        table = table.drop_columns("not_cold") if "not_cold" in table.column_names else table
        marked[part] = table.append_column("not_cold", warm.cast(pa.int8()))
    return marked


def make_ratings(
    dataset: RatingsDataset,
    histories: Sequence[Sequence[str]],
    items: Sequence[str],
    users: Sequence[str | None] | None = None,
    is_warm: Sequence[bool] | np.ndarray | None = None,
) -> Dataset:
    """Return rows of ratings, all labels 0, of users who liked `histories` and are asked about `items`.

    Args:
        histories: item ids, oldest first.
        users: ids; None or "0" for a user who is not in the data.
        is_warm: whether user and item count as known to training (default: those that are in it).

    Raises:
        InputError: numbers of rows that differ; an item without a text, a user without a number.
    """
    users = [None] * len(histories) if users is None else users
    if not len(histories) == len(items) == len(users):
        raise InputError(f"{len(histories)} histories, {len(items)} items, {len(users)} users: give one of each a row")
    numbers, num_users = [], dataset.num_users
    for row, (user, item, history) in enumerate(zip(users, items, histories, strict=True)):
        if isinstance(history, str):
            raise InputError(f"row {row}: should have a list of item ids, not the text {history[:50]!r}")
        if unknown := next((name for name in (item, *history) if name not in dataset.items), None):
            raise InputError(f"row {row}: item {unknown!r} is not in item.json of {dataset.name}")
        if user is not None and (not str(user).isdecimal() or len(str(user)) > 9 or int(user) >= num_users):
            raise InputError(f"row {row}: user {str(user)[:50]!r} is not in {dataset.name}; give None for a new user")
        numbers.append((int(user or 0), int(item), [int(liked) for liked in history]))
    uid, iid = (np.array([number[column] for number in numbers], dtype=np.int64) for column in (0, 1))
    zeros = np.zeros(len(numbers), dtype=np.int64)
    now = zeros + np.iinfo(np.int64).max  # after everything that was rated
    columns = {"uid": uid, "iid": iid, "label": zeros, "timestamp": now, "his": [number[2] for number in numbers]}
    if is_warm is None:
        train = dataset.parts["train"]
        is_warm = np.isin(uid, np.unique(to_numpy(train, "uid"))) & np.isin(iid, np.unique(to_numpy(train, "iid")))
    columns["not_cold"] = np.array(is_warm, dtype=np.int64)
    return Dataset(pa.table({name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()}))


def _read_part(path: Path, item_ids: np.ndarray) -> pa.Table:
    """Return a part with the types of COLUMNS; `not_cold` can be missing, in files of CoLLM's authors."""
    table = read_table(path)
    names = [name for name in COLUMNS if name != "not_cold" or name in table.column_names]
    if missing := [name for name in names if name not in table.column_names]:
        raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise InputError(f"{path}: has no rows")
    columns = {}
    for name in names:
        values, kind = table.column(name), COLUMNS[name]
        if values.null_count:
            raise InputError(f"{path}: row {pc.is_null(values).to_numpy().argmax()} has no {name}")
        try:
            columns[name] = values.cast(kind).combine_chunks()
        except pa.ArrowException as error:
            raise InputError(f"{path}: column {name!r} should be {kind}, not {values.type} ({error})") from None
    columns["his"] = without_padding(columns["his"])
    for fault, is_invalid in row_faults(columns, item_ids).items():
        if is_invalid.any():
            row = int(is_invalid.argmax())
            numbers = {name: column[row] for name, column in columns.items()}
            raise InputError(f"{path}: row {row} has {fault.format(**numbers)}")
    if len(pc.unique(columns["label"])) == 1:
        raise InputError(f"{path}: all labels are {columns['label'][0]}; AUC needs both 0 and 1")
    return pa.table(columns)


def read_table(path: Path) -> pa.Table:
    """Read a parquet file; InputError if it is none."""
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with python -m data.prepare --task preference") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


def without_padding(his: pa.ListArray) -> pa.ListArray:
    """Remove the zeros from histories: CoLLM's authors publish them padded to one length."""
    items = his.flatten()
    is_padding = pc.fill_null(pc.equal(items, 0), False).to_numpy(zero_copy_only=False)
    if not is_padding.any():
        return his
    ends = np.cumsum(pc.list_value_length(his).to_numpy(zero_copy_only=False))
    kept_before = np.concatenate([[0], np.cumsum(~is_padding)])
    offsets = pa.array(kept_before[np.concatenate([[0], ends])], pa.int32())
    return pa.ListArray.from_arrays(offsets, items.filter(pa.array(~is_padding)))


def row_faults(columns: dict[str, pa.Array], item_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows that have each kind of fault, bool [rows]; a key is a format string of the row's values."""
    numbers = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items() if name != "his"}
    his = columns["his"]
    liked = pc.fill_null(his.flatten(), 0).to_numpy()
    rows_of_liked = np.repeat(np.arange(len(his)), pc.list_value_length(his).to_numpy(zero_copy_only=False))
    has_unknown = np.zeros(len(his), bool)
    has_unknown[rows_of_liked[~np.isin(liked, item_ids)]] = True
    flags = [name for name in ("label", "not_cold") if name in numbers]
    return {f"{name} {{{name}}}; it should be 0 or 1": ~np.isin(numbers[name], (0, 1)) for name in flags} | {
        "user {uid}; ids go from 1 to 999999999": (numbers["uid"] < 1) | (numbers["uid"] > 999_999_999),
        "item {iid}, which is not in item.json": ~np.isin(numbers["iid"], item_ids),
        "a history with an item that is not in item.json": has_unknown,
    }
