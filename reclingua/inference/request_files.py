"""Files that recommend.py reads: histories of users, pairs of user and item, lists of items; streamed and checked.

A file is parquet, jsonl (an object a line) or csv (with a header), by its ending.
"""

import csv
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reclingua.datasets.interactions import MAX_ID
from reclingua.utils.errors import InputError

MAX_ITEMS = 9999  # of a history in a file; a model reads the last few dozen
BATCH = 1024  # rows of a parquet file in memory at a time
NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of characters

User = tuple[str, list[str]]  # id and items, oldest first
Pair = tuple[str, str]  # user and item


@dataclass(frozen=True)
class HistoryCounts:
    """Counts of a file of histories.

    Args:
        users: all of them.
        unknown_items: interactions with items that the model does not know.
        without_items: users without any known item.
    """

    users: int
    unknown_items: int
    without_items: int


def count_histories(users: Iterator[User], known: Collection[str], path: Path | None = None) -> HistoryCounts:
    """Read all users once and count them; a user takes 8 bytes.

    Args:
        known: items of the model.
        path: the file they come from, for messages.

    Raises:
        InputError: a row is invalid, there is no user, or the file has the same user twice.
    """
    hashes, unknown_items, without_items = array("q"), 0, 0
    for user, history in users:
        unknown = sum(item not in known for item in history)
        unknown_items += unknown
        without_items += unknown == len(history)
        hashes.append(hash(user))
    if not hashes:
        raise InputError(f"{path}: has no users")
    if path is not None:
        _check_unique(path, np.frombuffer(hashes, np.int64))
    return HistoryCounts(len(hashes), unknown_items, without_items)


def _check_unique(path: Path, hashes: np.ndarray) -> None:
    """Raise InputError if two users are the same; the few whose hashes are equal are read again."""
    values, counts = np.unique(hashes, return_counts=True)
    repeated, seen = set(values[counts > 1].tolist()), set()
    if not repeated:
        return
    for user, _ in read_histories(path):
        if user in seen:
            raise InputError(f"{path}: user {user!r} occurs twice; give each user one row with all items")
        if hash(user) in repeated:
            seen.add(user)


def read_histories(path: Path) -> Iterator[User]:
    """Yield (user, items) from a file with the columns user and items, which are in time order.

    In csv the items are separated by spaces.

    Raises:
        InputError: names the file and the invalid row.
    """
    for place, (user, items) in _read_rows(path, ("user", "items")):
        if path.suffix.lower() == ".csv":
            items = str(items).split()
        if not isinstance(items, list):
            raise InputError(f"{place}: items should be a list of item ids, not {_shown(items)}")
        if len(items) > MAX_ITEMS:
            raise InputError(f"{place}: has {len(items):,} items; give the latest {MAX_ITEMS:,} at most")
        yield _to_id(user, "user", place), [_to_id(item, "item", place) for item in items]


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield (user, item) from a file with the columns user and item; InputError names an invalid row."""
    for place, (user, item) in _read_rows(path, ("user", "item")):
        yield _to_id(user, "user", place), _to_id(item, "item", place)


def read_item_list(path: Path) -> set[str]:
    """Return the items of a file with one id a line; InputError if it cannot be read or has none."""
    with _one_line_errors(path), path.open(encoding="utf-8-sig") as file:
        items = {line.strip() for line in file} - {""}
    if not items:
        raise InputError(f"{path}: has no items; it should have one id a line")
    return items


def _read_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, tuple]]:
    """Yield (place for messages, values of `columns`) for each row."""
    readers: dict[str, Callable] = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if (ending := path.suffix.lower()) not in readers:
        raise InputError(f"{path}: should end in {', '.join(readers)}")
    with _one_line_errors(path):
        yield from readers[ending](path, columns)


def _read_parquet(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, tuple]]:
    with pq.ParquetFile(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        row = 0
        for batch in file.iter_batches(BATCH, columns=list(columns)):
            for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                yield f"{path}: row {row}", values
                row += 1


def _read_jsonl(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, tuple]]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no id")

    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}: line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=refuse)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{place} should be an object with {' and '.join(columns)}, not {_shown(row)}")
            _check_columns(place, columns, row)
            yield place, tuple(row[name] for name in columns)


def _read_csv(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, tuple]]:
    csv.field_size_limit(MAX_ITEMS * (MAX_ID + 1))  # of a history
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _check_columns(path, columns, reader.fieldnames or [])
        for row in reader:
            place = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{place}: should have {len(reader.fieldnames or [])} values, like the header")
            yield place, tuple(row[name] for name in columns)


def _check_columns(place: object, columns: tuple[str, str], present: Collection[str]) -> None:
    if repeated := next((name for name in columns if list(present).count(name) > 1), None):
        raise InputError(f"{place}: has more than one {repeated!r}; leave one of them out")
    if missing := next((name for name in columns if name not in present), None):
        names = ", ".join(map(str, present))[:100] or "nothing"
        raise InputError(f"{place}: has no {missing!r}; it has {names}, and needs {' and '.join(columns)}")


def _to_id(value: object, kind: str, place: str) -> str:
    """Return an id as a string; InputError if it is neither a text nor a whole number."""
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not text or len(text) > MAX_ID or NO_TEXT.search(text):
        raise InputError(f"{place}: {kind} {_shown(value)} is no id: ids are texts or whole numbers")
    return text


def _shown(value: object) -> str:
    return repr(value)[:60]


class _one_line_errors:  # noqa: N801 (used like a function)
    """Context manager that turns what goes wrong with reading a file into an InputError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.path}: no such file") from None
        if isinstance(error, OSError | UnicodeDecodeError | OverflowError | csv.Error | pa.ArrowException):
            raise InputError(f"{self.path}: cannot be read ({error})") from None
