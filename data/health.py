"""Health of item texts, popularity and histories: what a next-item dataset contains, and its odd records."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.cleaning import clean_value
from reclingua.datasets.interactions import MAX_ID, read_codes, read_embeddings, read_items
from reclingua.datasets.item_texts import TEXT_KEYS, complete_titles, describe_untitled, to_text
from reclingua.utils.errors import InputError
from reclingua.utils.files import read_json
from reclingua.utils.text import shorten

DOMINANT_SHARE = 0.05  # of all interactions; a user with more of them is shown
CLEAN = "python -m data.clean makes a clean copy"


class Health:
    """A health report: facts about a dataset, and findings with what follows from them."""

    def __init__(self, title: str):
        self.title = title
        self.facts: list[str] = []
        self.findings: list[str] = []

    def add(self, count: int, text: str) -> None:
        """Add a finding unless its count is 0; `text` begins after the number."""
        if count:
            self.findings.append(f"{count:,} {text}")

    def format(self) -> str:
        """Return the report as lines."""
        found = [f"  - {finding}" for finding in self.findings] or ["  none"]
        return "\n".join([self.title, *(f"  {fact}" for fact in self.facts), "findings:", *found])


def check_histories(folder: Path, name: str) -> Health:
    """Return the health of the next-item dataset in a folder.

    Raises:
        InputError: a file cannot be read, or has another structure.
    """
    health = Health(f"{name}: next-item dataset in {folder}")
    histories = read_histories(folder / f"{name}.inter.json", health)
    item_path = folder / f"{name}.item.json"
    items = read_items(item_path) if item_path.exists() else {}
    used = Counter(item for history in histories.values() for item in history)
    if not used:
        raise InputError(f"{folder / f'{name}.inter.json'}: no user has an interaction")
    lengths = np.array([len(history) for history in histories.values()])
    num_items = len(items) or len(used)
    total = int(lengths.sum())
    health.facts += [
        f"users {len(histories):,}   items {num_items:,}   interactions {total:,}   "
        f"density {total / len(histories) / num_items:.2%}",
        f"interactions per user: min {lengths.min():,}, median {np.median(lengths):,.0f}, mean {lengths.mean():,.1f}, "
        f"max {lengths.max():,}",
        describe_popularity(used.values(), num_items),
        "ties of timestamps: unknown, the files have no times",
    ]
    check_repetitions(histories, used, health)
    check_owners({user: len(history) for user, history in histories.items()}, health)
    if items:
        unknown = {item: count for item, count in used.items() if item not in items}
        health.add(
            sum(unknown.values()),
            f"interactions with {len(unknown):,} items that {item_path.name} lacks, such as "
            f"{next(iter(unknown), '')[:50]!r}: commands refuse the dataset; {CLEAN} without them",
        )
        health.add(sum(item not in used for item in items), "items of the catalogue without interactions")
        check_texts(items, health)
    else:
        health.findings.append(f"no {item_path.name}: no titles, no text embedding, no tasks with texts")
    known = items or used
    for path in sorted(folder.glob(f"{name}*.index.json")):
        check_index(path, known, health)
    for path in sorted(folder.glob(f"{name}.emb-*.npy")):
        try:
            read_embeddings(path, num_items)
        except InputError as error:
            health.findings.append(str(error))
    return health


def read_histories(path: Path, health: Health) -> dict[str, list[str]]:
    """Return user -> item ids, and add the users and ids that commands leave out or refuse to the findings."""
    histories, num_empty, num_refused = {}, 0, 0
    for user, history in read_json(path, "user -> list of items in time order").items():
        if not isinstance(history, list):
            raise InputError(f"{path}: user {user[:50]!r} should have a list of item ids, oldest first")
        ids = [str(int(item)) if isinstance(item, float) and item.is_integer() else item for item in history]
        kept = [str(item) for item in ids if is_id(item)]
        num_empty += not history
        num_refused += len(ids) - len(kept)
        if kept and len(user) <= MAX_ID:
            histories[user] = kept
    health.add(num_empty, "users without interactions: left out")
    health.add(num_refused, f"interactions with an item that is no id: commands refuse the dataset; {CLEAN}")
    short = sum(len(history) < 3 for history in histories.values())
    health.add(short, "users with fewer than 3 interactions: they train, but have no valid and no test item")
    return histories


def is_id(item: object) -> bool:
    """Return whether a value is a usable item id."""
    return isinstance(item, int | str) and not isinstance(item, bool) and len(str(item)) <= MAX_ID


def describe_popularity(counts: Iterable[int], num_items: int) -> str:
    """Return how unevenly interactions are spread over items; items without interactions count."""
    ordered = np.zeros(num_items)
    values = np.sort(np.fromiter(counts, float))[::-1][:num_items]
    ordered[: len(values)] = values
    total = ordered.sum()
    shares = [ordered[: max(1, round(num_items * part))].sum() / total for part in (0.01, 0.1)]
    ranks = np.arange(1, num_items + 1)
    gini = 1 + 1 / num_items - 2 * (ranks * ordered).sum() / (num_items * total)
    return (
        f"popularity: the top 1% of the items have {shares[0]:.1%} of the interactions, the top 10% {shares[1]:.1%}; "
        f"Gini coefficient {gini:.2f}"
    )


def check_repetitions(histories: dict[str, list[str]], used: Counter, health: Health) -> None:
    """Add repeated items, equal histories and test items that training never sees."""
    total = sum(used.values())
    repeated = sum(len(history) - len(set(history)) for history in histories.values())
    in_a_row = sum(a == b for history in histories.values() for a, b in pairwise(history))
    health.facts.append(f"repeated items: {repeated / total:.1%} of the interactions are with an item of before")
    health.add(in_a_row, "interactions repeat the item just before: are they duplicates?")
    testable = [history for history in histories.values() if len(history) >= 3]
    seen = sum(history[-1] in history[:-1] for history in testable)
    health.add(seen, f"of {len(testable):,} test items were in the user's history: see --exclude_seen of test.py")
    trained = {item for history in histories.values() for item in (history[:-2] if len(history) >= 3 else history)}
    cold = sum(history[-1] not in trained for history in testable)
    health.add(cold, f"of {len(testable):,} test items occur in no training interaction")
    copies = Counter(tuple(history) for history in histories.values() if len(history) >= 3)
    health.add(
        sum(n for n in copies.values() if n > 1), "users have the same history as another: are they duplicates?"
    )


def check_owners(counts: dict[str, int], health: Health) -> None:
    """Add a user who has a large share of all interactions."""
    user, most = max(counts.items(), key=lambda entry: entry[1])
    total = sum(counts.values())
    if most > DOMINANT_SHARE * total and most > 5 * float(np.median(list(counts.values()))):
        health.findings.append(f"user {user[:50]!r} has {most / total:.1%} of all interactions: a person, or a mark?")


def check_texts(items: dict[str, dict], health: Health) -> None:
    """Add items without texts, with equal texts, and texts that cleaning would change."""
    for key in TEXT_KEYS:
        changed = [item for item, record in items.items() if is_unclean(record.get(key))]
        example = f"{shorten(to_text(items[changed[0]][key]), 60)!r} of item {changed[0]!r}" if changed else ""
        health.add(
            len(changed), f"of {len(items):,} {key}s contain HTML, entities or lists, such as {example}; {CLEAN}"
        )
    texts = Counter(
        text for record in items.values() if (text := tuple(to_text(record.get(key)) for key in TEXT_KEYS)) != ("", "")
    )
    health.add(sum(n for n in texts.values() if n > 1), "items have the same title and description as another")
    no_text = sum(not any(to_text(record.get(key)) for key in TEXT_KEYS) for record in items.values())
    health.add(no_text, "items have neither title nor description")
    remark = describe_untitled(complete_titles({item: dict(record) for item, record in items.items()}).values())
    health.findings += [remark] if remark else []


def is_unclean(value: object) -> bool:
    """Return whether cleaning changes more than the white space of a text."""
    return value is not None and (not isinstance(value, str) or clean_value(value) != " ".join(value.split()))


def check_index(path: Path, known: Iterable[str], health: Health) -> None:
    """Add items without a semantic ID, with the semantic ID of another, and semantic IDs of no item."""
    index, items = read_codes(path), set(known)
    owners = Counter(map("".join, index.values()))
    depth = Counter(map(len, index.values()))
    lengths = ", ".join(f"{length} codes" for length in sorted(depth))
    health.facts.append(f"{path.name}: {len(owners):,} semantic IDs of {lengths}")
    shared = sum(count for count in owners.values() if count > 1)
    health.add(shared, f"items share a semantic ID of {path.name}: lcrec refuses it; see python -m index.repair")
    health.add(sum(item not in index for item in items), f"items have no semantic ID in {path.name}: lcrec refuses it")
    health.add(sum(item not in items for item in index), f"semantic IDs of {path.name} are of no item of the dataset")


def to_lines(content: object) -> str:
    """Return a JSON text, as dataset files have it."""
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
