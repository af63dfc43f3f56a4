"""D.user.json: what users prefer, and what they were looking for when they took an item; LC-Rec's file, checked.

python -m data.intentions writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from reclingua.datasets.interactions import RecDataset, dataset_file
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json

PREFERENCES, INTENTIONS = "user_explicit_preference", "user_vague_intention"
PARTS = ("train", "test")


class Intention(NamedTuple):
    """What a user was looking for.

    `item` is what was found; `history` what the user had before, oldest first; `of_user` says it as the user would,
    `of_item` describes the item. None of both names it.
    """

    item: str
    history: list[str]
    of_user: str
    of_item: str


@dataclass(frozen=True)
class UserTexts:
    """`preferences`: user -> texts; `intentions`: "train" or "test" -> user -> intention."""

    preferences: dict[str, list[str]] = field(default_factory=dict)
    intentions: dict[str, dict[str, Intention]] = field(default_factory=lambda: {part: {} for part in PARTS})

    def sha256(self) -> str:
        return sha256(repr(self).encode()).hexdigest()


def intention_context(dataset: RecDataset, user: str, part: str) -> tuple[list[str], str]:
    """(what the user had before, the item taken) that an intention of `part` is about.

    Of "test" the last item; of "train" the last one that training knows, so that nothing held out is told.
    """
    history = dataset.histories[user] if part == "test" else dataset.train_history(user)
    return history[:-1], history[-1]


def read_users(dataset: RecDataset, user_file: str | Path = ".user.json") -> UserTexts:
    """The texts of the dataset's users; some of them may have none.

    Args:
        user_file: suffix of the file, or a path if it holds a slash.

    Raises:
        InputError: naming the file and the user; also where a text of "train" is about an item held out.
    """
    path = dataset_file(dataset.folder, dataset.name, user_file)
    content = read_json(path, f"{PREFERENCES} and {INTENTIONS}; python -m data.intentions makes it")
    texts = UserTexts()
    for user, given in _section(content, PREFERENCES, path).items():
        _known(user, dataset, path)
        if not isinstance(given, list) or not given or not all(_is_text(text) for text in given):
            raise InputError(f"{path}: {PREFERENCES} of user {user!r} should be a list of texts")
        texts.preferences[user] = [text.strip() for text in given]
    parts = _section(content, INTENTIONS, path)
    for part in PARTS:
        for user, record in _section(parts, part, path, optional=True).items():
            _known(user, dataset, path)
            texts.intentions[part][user] = _intention(record, dataset, user, part, path)
    return texts


def write_users(path: Path, texts: UserTexts) -> None:
    """Write `texts` in LC-Rec's format."""
    intentions = {
        part: {
            user: {"item": found.item, "inters": found.history, "querys": [found.of_user, found.of_item]}
            for user, found in texts.intentions[part].items()
        }
        for part in PARTS
    }
    write_json(path, {PREFERENCES: texts.preferences, INTENTIONS: intentions}, indent=1)


def _section(content: Mapping, key: str, path: Path, optional: bool = False) -> dict:
    section = content.get(key, {} if optional else None)
    if not isinstance(section, dict):
        raise InputError(f"{path}: {key!r} should be there and map users to texts; see python -m data.intentions")
    return section


def _known(user: str, dataset: RecDataset, path: Path) -> None:
    if user not in dataset.histories:
        raise InputError(f"{path}: user {user!r} is not in {dataset.name}.inter.json; the files are of different data")


def _is_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _intention(record: object, dataset: RecDataset, user: str, part: str, path: Path) -> Intention:
    where = f"{path}: {INTENTIONS}, {part}, user {user!r}"
    queries = record.get("querys") if isinstance(record, dict) else None
    if not isinstance(queries, list) or len(queries) != 2 or not all(_is_text(query) for query in queries):
        raise InputError(f"{where} should have an item, inters and two querys, the user's and the item's")
    item, inters = record.get("item"), record.get("inters")
    if not isinstance(item, int | str) or not isinstance(inters, list):
        raise InputError(f"{where} should have an item and a list of inters")
    item, history = str(item), [str(each) for each in inters]
    told = dataset.histories[user] if part == "test" else dataset.train_history(user)
    if item not in told or part == "test" and item != told[-1]:
        which = "not the user's last" if part == "test" else "not in what training knows of the user"
        raise InputError(f"{where} is about item {item!r}, which is {which}")
    before = told[: len(told) - 1 - told[::-1].index(item)]
    if (other := next((each for each in history if each not in before), None)) is not None:
        raise InputError(f"{where} has item {other!r} among its inters, which the user did not have before {item!r}")
    return Intention(item, history, queries[0].strip(), queries[1].strip())
