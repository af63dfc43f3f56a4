"""User texts: preferences of users and intentions behind interactions, from LC-Rec's file D.user.json.

python -m data.intentions writes this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from reclingua.datasets.interactions import InteractionDataset, check_made_from
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json, write_json

PREFERENCES, INTENTIONS = "user_explicit_preference", "user_vague_intention"
PARTS = ("train", "test")


class Intention(NamedTuple):
    """Intention behind one interaction.

    `item` is the item taken; `history` contains the user's items before it, oldest first; `of_user` is the request in
    the user's words, `of_item` a description of the item. Neither names the item.
    """

    item: str
    history: list[str]
    of_user: str
    of_item: str


@dataclass(frozen=True)
class UserTexts:
    """Texts of users; `preferences`: user -> texts; `intentions`: "train" or "test" -> user -> intention."""

    preferences: dict[str, list[str]] = field(default_factory=dict)
    intentions: dict[str, dict[str, Intention]] = field(default_factory=lambda: {part: {} for part in PARTS})

    def sha256(self) -> str:
        """Return the fingerprint that a checkpoint stores to refuse other texts."""
        return sha256(repr(self).encode()).hexdigest()


def intention_context(dataset: InteractionDataset, user: str, part: str) -> tuple[list[str], str]:
    """Return (history, item taken) that an intention of `part` describes.

    For "test" this is the last item; for "train" the last training item, so that no held-out item is disclosed.
    """
    history = dataset.histories[user] if part == "test" else dataset.train_history(user)
    return history[:-1], history[-1]


def read_user_texts(dataset: InteractionDataset, user_file: str | Path = ".user.json") -> UserTexts:
    """Read the texts of the dataset's users; not every user has some.

    Args:
        user_file: file suffix, or a path if it contains a slash.

    Raises:
        InputError: names the file and the user; also if a "train" text describes a held-out item, or if the texts
            were made from other items or histories.
    """
    path = dataset.file_path(user_file)
    check_made_from(path, dataset, f"python -m data.intentions; move {path.name} away first")
    content = read_json(path, f"{PREFERENCES} and {INTENTIONS}; python -m data.intentions makes it")
    texts = UserTexts()
    for user, preferences in _section(content, PREFERENCES, path).items():
        _check_user(user, dataset, path)
        if not isinstance(preferences, list) or not preferences or not all(map(_is_text, preferences)):
            raise InputError(f"{path}: {PREFERENCES} of user {user!r} should be a list of texts")
        texts.preferences[user] = [text.strip() for text in preferences]
    parts = _section(content, INTENTIONS, path)
    for part in PARTS:
        for user, record in _section(parts, part, path, optional=True).items():
            _check_user(user, dataset, path)
            texts.intentions[part][user] = _read_intention(record, dataset, user, part, path)
    return texts


def write_user_texts(path: Path, texts: UserTexts) -> None:
    """Write `texts` in LC-Rec's format."""
    intentions = {
        part: {
            user: {"item": about.item, "inters": about.history, "querys": [about.of_user, about.of_item]}
            for user, about in texts.intentions[part].items()
        }
        for part in PARTS
    }
    write_json(path, {PREFERENCES: texts.preferences, INTENTIONS: intentions}, indent=1)


def _section(content: Mapping, key: str, path: Path, optional: bool = False) -> dict:
    section = content.get(key, {} if optional else None)
    if not isinstance(section, dict):
        raise InputError(f"{path}: {key!r} should exist and map users to texts; see python -m data.intentions")
    return section


def _check_user(user: str, dataset: InteractionDataset, path: Path) -> None:
    if user not in dataset.histories:
        raise InputError(f"{path}: user {user!r} is not in {dataset.name}.inter.json; the files are of different data")


def _is_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _read_intention(record: object, dataset: InteractionDataset, user: str, part: str, path: Path) -> Intention:
    where = f"{path}: {INTENTIONS}, {part}, user {user!r}"
    record = record if isinstance(record, dict) else {}
    queries = record.get("querys")
    if not isinstance(queries, list) or len(queries) != 2 or not all(_is_text(query) for query in queries):
        raise InputError(f"{where} should have an item, inters and two querys, the user's and the item's")
    item, inters = record.get("item"), record.get("inters")
    if not isinstance(item, int | str) or not isinstance(inters, list):
        raise InputError(f"{where} should have an item and a list of inters")
    item, history = str(item), [str(inter) for inter in inters]
    items = dataset.histories[user] if part == "test" else dataset.train_history(user)
    if item not in items or part == "test" and item != items[-1]:
        fault = "not the user's last" if part == "test" else "not in the user's training history"
        raise InputError(f"{where} is about item {item!r}, which is {fault}")
    before = items[: len(items) - 1 - items[::-1].index(item)]
    if (other := next((inter for inter in history if inter not in before), None)) is not None:
        raise InputError(f"{where} has item {other!r} among its inters, which the user did not have before {item!r}")
    return Intention(item, history, queries[0].strip(), queries[1].strip())
