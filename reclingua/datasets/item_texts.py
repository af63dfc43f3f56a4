"""Item texts: the one rule for items without a title, and texts that are lists."""

from collections import Counter
from collections.abc import Iterable

TEXT_KEYS = ("title", "description")
# Keys that name an item without a title, in order of preference; an item with none of them is named by its id.
FALLBACK_KEYS = ("description", "brand", "store", "categories", "category", "class", "genres")
MAX_TITLE = 80  # characters of a title that is made of another text


def to_text(value: object, separator: str = ", ") -> str:
    """Return a text, number or (nested) list of them as one text; "" for None."""
    texts, pending = [], [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list | tuple):
            pending += reversed(part)
        elif part is not None and (text := str(part).strip()):
            texts.append(text)
    return separator.join(texts)


def complete_titles(items: dict[str, dict]) -> dict[str, str]:
    """Make titles and descriptions texts, and give every item a title, in place.

    An item without a title is named by its description, brand or categories, cut to MAX_TITLE characters, else by its
    id ("item 7").

    Returns:
        item without a title of its own -> the key that names it, "id" for the id.
    """
    untitled = {}
    for item, record in items.items():
        for key in TEXT_KEYS:
            if not isinstance(record.get(key, ""), str):
                record[key] = to_text(record[key], " ")
        if str(record.get("title") or "").strip():
            continue
        texts = ((key, " ".join(to_text(record.get(key)).split())) for key in FALLBACK_KEYS)
        key, text = next(((key, text) for key, text in texts if text), ("id", f"item {item}"))
        record["title"] = text if len(text) <= MAX_TITLE else text[:MAX_TITLE].rsplit(" ", 1)[0] + " …"
        untitled[item] = key
    return untitled


def describe_untitled(keys: Iterable[str]) -> str:
    """Return a sentence on items without a title, from the values of `complete_titles`; "" if there is none."""
    counts = Counter(keys)
    if not counts:
        return ""
    named = ", ".join(f"{key} ({count:,})" for key, count in counts.most_common())
    return f"{counts.total():,} items without a title are named by their {named}"
