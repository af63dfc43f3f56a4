"""Open and check a dataset folder: the one gate through which every script reads interactions, items and indices.

A dataset D is the folder <data_path>/D/ with D.inter.json, and D.item.json and D.index.json where a script needs them.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json

TEXT_KEYS = ("title", "description")


@dataclass(frozen=True)
class RecDataset:
    """Interactions in time order, split leave-one-out: last item = test, last but one = valid, the rest = train.

    Users with fewer than three interactions can't be split: all they have is train (`too_short` lists them).
    """

    name: str
    folder: Path
    histories: dict[str, list[str]]
    items: dict[str, dict] = field(default_factory=dict)  # empty where no D.item.json was read
    index: dict[str, list[str]] = field(default_factory=dict)  # empty where no index was asked for

    @property
    def item_ids(self) -> list[str]:
        """Every item, numeric ids in numeric order: row i of an embedding file belongs to item i of this list."""
        ids = self.items or self.index or {item for history in self.histories.values() for item in history}
        return sorted(ids, key=int) if all(item.isdecimal() for item in ids) else list(ids)

    @property
    def too_short(self) -> list[str]:
        return [user for user, history in self.histories.items() if len(history) < 3]

    @property
    def test_users(self) -> list[str]:
        """Users that have a valid and a test item."""
        return [user for user, history in self.histories.items() if len(history) >= 3]

    def train_history(self, user: str) -> list[str]:
        history = self.histories[user]
        return history[:-2] if len(history) >= 3 else history

    def split(self, user: str, part: str) -> tuple[list[str], str]:
        """(what the user had before, the item to find) for `part` "valid" or "test"."""
        history = self.histories[user]
        return (history[:-2], history[-2]) if part == "valid" else (history[:-1], history[-1])

    def sha256(self, part: str) -> str:
        """Fingerprint of `part`, "index" or "histories"; a checkpoint keeps it and refuses other data."""
        return hashlib.sha256(json.dumps(getattr(self, part), sort_keys=True).encode()).hexdigest()

    def title(self, item: str) -> str:
        """The item's title; its id where the dataset has no item texts."""
        return str(self.items.get(item, {}).get("title") or f"item {item}").strip()

    def text(self, item: str) -> str:
        """Title and description, what the text embedding reads."""
        return ". ".join(text for key in TEXT_KEYS if (text := str(self.items[item].get(key) or "").strip()))


def open_dataset(
    data_path: str | Path, name: str, needs: Collection[str] = (), index_file: str | Path = ".index.json"
) -> RecDataset:
    """Read dataset `name` below `data_path`, check it, and return it with all ids as strings.

    Args:
        needs: "items" where item texts are required, "index" where indices are. Without "items" the texts are read
            if the file is there.
        index_file: suffix of the index file (LC-Rec's way: D + suffix), or a path if it holds a slash.

    Raises:
        InputError: naming the file and the record that is wrong.
    """
    folder = Path(data_path) / name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such dataset folder; make it with python -m data.prepare, or see --data_path")
    inter_path, item_path = folder / f"{name}.inter.json", folder / f"{name}.item.json"
    histories = _read_histories(inter_path)
    items = _read_items(item_path, "items" in needs) if "items" in needs or item_path.exists() else {}
    index_path = dataset_file(folder, name, index_file)
    index = _read_index(index_path) if "index" in needs else {}

    for known, path in ((items, item_path), (index, index_path)):
        if not known:
            continue
        for user, history in histories.items():
            unknown = next((item for item in history if item not in known), None)
            if unknown is not None:
                raise InputError(f"{inter_path}: user {user!r} has item {unknown!r}, which is not in {path.name}")
    if items and index and (missing := next((item for item in items if item not in index), None)) is not None:
        raise InputError(
            f"{index_path}: item {missing!r} of {item_path.name} has no index; run python -m index.generate"
        )
    if items and index and (extra := next((item for item in index if item not in items), None)) is not None:
        raise InputError(f"{index_path}: item {extra!r} is not in {item_path.name}; the files are of different data")
    return RecDataset(name, folder, histories, items, index)


def dataset_file(folder: Path, name: str, file: str | Path) -> Path:
    """Where a file of dataset `name` is: `file` is a suffix, LC-Rec's way, or a path if it holds a slash."""
    return Path(file) if "/" in str(file) else folder / f"{name}{file}"


def _read_histories(path: Path) -> dict[str, list[str]]:
    histories = {}
    for user, history in read_json(path, "user -> list of items in time order").items():
        if not isinstance(history, list) or not all(isinstance(item, int | str) for item in history):
            raise InputError(f"{path}: user {user!r} should have a list of item ids, oldest first")
        if not history:
            raise InputError(f"{path}: user {user!r} has no interactions; take the user out")
        histories[str(user)] = [str(item) for item in history]
    if all(len(history) < 3 for history in histories.values()):
        raise InputError(f"{path}: no user has the three interactions that train, valid and test need")
    return histories


def _read_items(path: Path, need_text: bool) -> dict[str, dict]:
    items = read_json(path, "item -> title and description")
    for item, record in items.items():
        if not isinstance(record, dict):
            raise InputError(f"{path}: item {item!r} should be an object with a title and a description")
        if need_text and not any(str(record.get(key) or "").strip() for key in TEXT_KEYS):
            raise InputError(f"{path}: item {item!r} has neither title nor description; give it one or take it out")
    return items


def _read_index(path: Path) -> dict[str, list[str]]:
    index = read_codes(path)
    owner: dict[str, str] = {}  # as in a prompt: what is written alike is alike
    for item, codes in index.items():
        if (other := owner.setdefault("".join(codes), item)) != item:
            raise InputError(
                f"{path}: items {other!r} and {item!r} share the index {''.join(codes)}; every item needs its own: "
                "rebuild it with python -m index.generate, or tell them apart with python -m index.repair"
            )
    return index


def read_codes(path: Path) -> dict[str, list[str]]:
    """An index file, item -> code tokens; several items may have the same. InputError for what is no index."""
    index = read_json(path, "item -> list of code tokens")
    for item, codes in index.items():
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) and code for code in codes):
            raise InputError(f"{path}: item {item!r} should have a list of code tokens, not {codes!r}")
    return index


def read_embeddings(path: str | Path, rows: int | None = None) -> np.ndarray:
    """float32 [items, dim] from a .npy file, row i = item i, `rows` of them if given; InputError otherwise."""
    path = Path(path)
    try:
        embeddings = np.load(path, allow_pickle=False)
        if not isinstance(embeddings, np.ndarray):
            raise ValueError("it holds several arrays")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with python -m index.embed") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from None
    if embeddings.ndim != 2 or not embeddings.size or rows not in (None, len(embeddings)):
        raise InputError(
            f"{path}: has shape {list(embeddings.shape)}, but should have one row for each of {rows or 'the'} items; "
            "run python -m index.embed again"
        )
    if not np.issubdtype(embeddings.dtype, np.floating) or not np.isfinite(embeddings).all():
        raise InputError(f"{path}: holds values that are not finite numbers; run python -m index.embed again")
    return embeddings.astype(np.float32)
