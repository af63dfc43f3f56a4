"""Interaction datasets: read a dataset folder and check its interactions, item texts and semantic IDs.

LC-Rec calls the semantic ID of an item, a list of code tokens, its index.

A dataset D is the folder <data_path>/D/ with D.inter.json, and D.item.json and D.index.json where they are needed.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from reclingua.datasets.formats import conversion_hint
from reclingua.datasets.item_texts import TEXT_KEYS, complete_titles, describe_untitled, to_text
from reclingua.utils.errors import InputError
from reclingua.utils.files import check_complete, read_json
from reclingua.utils.provenance import fingerprint, read_record

MAX_ID = 1000  # characters of an id
# Parts of a dataset whose fingerprints the record of a derived file can hold -> how messages call them.
RECORDED_PARTS = {
    "texts": "items",
    "items": "items",
    "histories": "histories",
    "train_histories": "training histories",
}


@dataclass(frozen=True)
class InteractionDataset:
    """Interactions in time order, split leave-one-out: last item = test, last but one = valid, the rest = train.

    The interactions of users with fewer than three are all train (`too_short` lists these users).

    Args:
        name, folder: the dataset and where it was read from.
        histories: user -> item ids, oldest first.
        items: item -> texts by key; empty where D.item.json was not read.
        index: item -> code tokens of its semantic ID; empty where it was not needed.
        untitled: item without a title of its own -> the key of the text that names it, or "id".
        num_empty: users without interactions, who were left out.
    """

    name: str
    folder: Path
    histories: dict[str, list[str]]
    items: dict[str, dict] = field(default_factory=dict)
    index: dict[str, list[str]] = field(default_factory=dict)
    untitled: dict[str, str] = field(default_factory=dict)
    num_empty: int = 0

    @cached_property
    def item_ids(self) -> list[str]:
        """All items, numeric ids in numeric order; row i of an embedding file belongs to item i of this list."""
        ids = self.items or self.index or {item for history in self.histories.values() for item in history}
        return sorted(ids, key=int) if all(item.isdecimal() for item in ids) else list(ids)

    @property
    def files(self) -> dict[str, Path]:
        """The files of interactions and texts by a name for messages; no command may write its output there."""
        names = (f"{self.name}.inter.json", f"{self.name}.item.json")
        return {f"{name} of the dataset": self.folder / name for name in names}

    def file_path(self, file: str | Path) -> Path:
        """Return the path of a file of the dataset; `file` is a suffix, or a path if it contains a slash."""
        return dataset_file(self.folder, self.name, file)

    @property
    def too_short(self) -> list[str]:
        """Users with fewer than three interactions."""
        return [user for user, history in self.histories.items() if len(history) < 3]

    @property
    def test_users(self) -> list[str]:
        """Users with a valid and a test item."""
        return [user for user, history in self.histories.items() if len(history) >= 3]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Each item with its text, in the order of the rows of an embedding file; empty without item texts."""
        return [(item, self.text(item)) for item in self.item_ids] if self.items else []

    @property
    def train_histories(self) -> dict[str, list[str]]:
        """User -> training items, oldest first."""
        return {user: self.train_history(user) for user in self.histories}

    def train_history(self, user: str) -> list[str]:
        """Return the training items of a user, oldest first."""
        history = self.histories[user]
        return history[:-2] if len(history) >= 3 else history

    def split(self, user: str, part: str) -> tuple[list[str], str]:
        """Return (history, target item) of a user for `part` "valid" or "test"."""
        history = self.histories[user]
        return (history[:-2], history[-2]) if part == "valid" else (history[:-1], history[-1])

    def sha256(self, part: str) -> str:
        """Return the fingerprint of `part`, such as "index", which checkpoints and derived files store."""
        return fingerprint(getattr(self, part))

    def title(self, item: str) -> str:
        """Return the item's title, or its id where the dataset has no item texts."""
        return str(self.items.get(item, {}).get("title") or f"item {item}").strip()

    def text(self, item: str, fields: Sequence[str] = TEXT_KEYS) -> str:
        """Return the item's texts of `fields`, joined: the input of the text embedding; its title if it has none."""
        keys = [key for key in fields if key != "title" or self.untitled.get(item) not in fields]
        return ". ".join(text for key in keys if (text := to_text(self.items[item].get(key)))) or self.title(item)

    @property
    def remarks(self) -> list[str]:
        """Sentences on users that were left out and items that are named by another text than a title."""
        empty = f"{self.num_empty:,} users without interactions are left out" if self.num_empty else ""
        return [remark for remark in (empty, describe_untitled(self.untitled.values())) if remark]


def open_interactions(
    data_path: str | Path, name: str, needs: Collection[str] = (), index_file: str | Path = ".index.json"
) -> InteractionDataset:
    """Read and check interaction dataset `name` below `data_path`; all ids become strings.

    Args:
        needs: "items" if item texts are required, "index" if semantic IDs are. Without "items" the texts are read
            if their file exists.
        index_file: file suffix (as in LC-Rec: D + suffix), or a path if it contains a slash.

    Raises:
        InputError: names the file and the invalid record.
    """
    folder = Path(data_path) / name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such dataset folder; make it with python -m data.prepare, or see --data_path")
    check_complete(folder)
    inter_path, item_path = folder / f"{name}.inter.json", folder / f"{name}.item.json"
    if not inter_path.is_file():
        hint = conversion_hint(folder, name) or "make it with python -m data.prepare, whose --source lists the formats"
        raise InputError(f"{inter_path}: no such file; {hint}")
    histories, num_empty = _read_histories(inter_path)
    items = read_items(item_path) if "items" in needs or item_path.exists() else {}
    untitled = complete_titles(items)
    if "items" in needs and sum(key == "id" for key in untitled.values()) == len(items):
        raise InputError(f"{item_path}: no item has a title, description, brand or categories; give them one")
    index_path = dataset_file(folder, name, index_file)
    index = read_index(index_path) if "index" in needs else {}
    dataset = InteractionDataset(name, folder, histories, items, index, untitled, num_empty)
    if index:
        check_made_from(index_path, dataset, "python -m index.generate --force, or --extend for new items alone")

    for known, path in ((items, item_path), (index, index_path)):
        if not known:
            continue
        for user, history in histories.items():
            unknown = next((item for item in history if item not in known), None)
            if unknown is not None:
                raise InputError(f"{inter_path}: user {user!r} has item {unknown!r}, which is not in {path.name}")
    if items and index and (missing := next((item for item in items if item not in index), None)) is not None:
        raise InputError(
            f"{index_path}: item {missing!r} of {item_path.name} has no index; run python -m index.generate, with "
            "--extend for new items alone"
        )
    if items and index and (extra := next((item for item in index if item not in items), None)) is not None:
        raise InputError(f"{index_path}: item {extra!r} is not in {item_path.name}; the files are of different data")
    return dataset


def read_raw_ids(dataset: InteractionDataset) -> dict[str, str]:
    """Return item -> its id in the raw data, from D.item2id of data.prepare or LC-Rec; empty without that file."""
    return read_id_map(dataset.file_path(".item2id"))


def read_id_map(path: Path) -> dict[str, str]:
    """Return number -> raw id from an id map of data.prepare or LC-Rec; empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    escaped = {"t": "\t", "n": "\n", "r": "\r"}
    pairs = [line.rpartition("\t") for line in lines if "\t" in line]
    return {
        number.strip(): re.sub(r"\\(.)", lambda match: escaped.get(match[1], match[1]), raw)
        for raw, _, number in pairs
    }


def other_part(path: Path, dataset: InteractionDataset) -> str | None:
    """Return which part of `dataset` is another than the one that the file at `path` was made from.

    None if all are the same, or if the file has no record (reclingua/utils/provenance.py).
    """
    for part, stored in (read_record(path) or {}).items():
        is_read = part in RECORDED_PARTS and (dataset.items or part not in ("texts", "items"))
        if is_read and dataset.sha256(part) != stored:
            return RECORDED_PARTS[part]
    return None


def check_made_from(path: Path, dataset: InteractionDataset, command: str) -> None:
    """Raise InputError if the file at `path` was made from another dataset; `command` renews it."""
    if part := other_part(path, dataset):
        raise InputError(f"{path}: was made from other {part} than {dataset.folder} has now; renew it by {command}")


def dataset_file(folder: Path, name: str, file: str | Path) -> Path:
    """Return the path of a file of dataset `name`; `file` is a suffix, or a path if it contains a slash."""
    return Path(file) if "/" in str(file) else folder / f"{name}{file}"


def _read_histories(path: Path) -> tuple[dict[str, list[str]], int]:
    """Return user -> item ids, and the number of users without any, who are left out."""
    content = read_json(path, "user -> list of items in time order")
    histories = {}
    for user, history in content.items():
        check_id(path, user)
        if not isinstance(history, list):
            raise InputError(f"{path}: user {user!r} should have a list of item ids, oldest first")
        if history:
            histories[user] = [_item_id(path, user, item) for item in history]
    if all(len(history) < 3 for history in histories.values()):
        raise InputError(f"{path}: no user has the three interactions that train, valid and test need")
    return histories, len(content) - len(histories)


def _item_id(path: Path, user: str, item: object) -> str:
    if isinstance(item, float) and item.is_integer():  # 12.0, as pandas writes a column with missing values
        item = int(item)
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise InputError(f"{path}: user {user!r} should have a list of item ids, oldest first, not {str(item)[:50]!r}")
    return check_id(path, str(item))


def check_id(path: Path, name: str) -> str:
    """Return the id of a user or an item; InputError if it is longer than MAX_ID characters."""
    if len(name) > MAX_ID:
        raise InputError(f"{path}: the id {name[:20]}... has {len(name):,} characters; ids have at most {MAX_ID:,}")
    return name


def read_items(path: Path) -> dict[str, dict]:
    """Read item -> texts by key from D.item.json, as they are; InputError if a record is no object."""
    items = read_json(path, "item -> title and description")
    for item, record in items.items():
        check_id(path, item)
        if not isinstance(record, dict):
            raise InputError(f"{path}: item {item!r} should be an object with a title and a description")
    return items


def read_index(path: Path) -> dict[str, list[str]]:
    """Read item -> code tokens from an index file; InputError if it is no index, or two items share a semantic ID."""
    index = read_codes(path)
    owner: dict[str, str] = {}  # joined, as in a prompt: [<a>, <b>] and [<a><b>] are the same there
    for item, codes in index.items():
        if (other := owner.setdefault("".join(codes), item)) != item:
            raise InputError(
                f"{path}: items {other!r} and {item!r} share the index {''.join(codes)}; every item needs its own: "
                "rebuild it with python -m index.generate, or resolve the collisions with python -m index.repair"
            )
    return index


def read_codes(path: Path) -> dict[str, list[str]]:
    """Read item -> code tokens from an index file, collisions included; InputError if it is no index."""
    index = read_json(path, "item -> list of code tokens")
    for item, codes in index.items():
        check_id(path, item)
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) and code for code in codes):
            raise InputError(f"{path}: item {item!r} should have a list of code tokens, not {codes!r}")
    return index


def read_embeddings(path: str | Path, rows: int | None = None) -> np.ndarray:
    """Read float32 [items, dim] from a .npy file, row i = item i; InputError unless it has `rows` rows, if given."""
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
