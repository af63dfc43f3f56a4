"""Cleaning of catalogue texts: no HTML, no entities, no repeated white space."""

import ast
import html
import json
import re

# The semicolon is required: "R&D" is no entity.
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_INVISIBLE = re.compile(r"<!--.*?(-->|$)|<(script|style)\b[^<>]*>.*?(</\2\s*>|$)", re.DOTALL | re.IGNORECASE)
_INLINE_TAG = re.compile(
    r"</?(a|abbr|b|big|em|font|i|mark|s|small|span|strong|sub|sup|u)(\s[^<>]*)?/?>", re.IGNORECASE
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<![^<>]*>")
MAX_ESCAPES = 20
_ARTICLES = {"The", "A", "An", "La", "Le", "Les", "Il", "Das"}


def clean_text(text: str) -> str:
    """Return text as a browser would display it, in one line.

    Entities are decoded up to MAX_ESCAPES times, since shops escape twice ('&amp;amp;'). Tags become a space, inline
    tags nothing; comments, scripts and style sheets are removed with their content. 'a < b' and '<3' are no tags.
    """
    for _ in range(MAX_ESCAPES):
        if (decoded := _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)) == text:
            break
        text = decoded
    if "<" in text:
        text = _TAG.sub(" ", _INLINE_TAG.sub("", _INVISIBLE.sub(" ", text)))
    return " ".join(text.split())


def clean_value(value: object, separator: str = " ") -> str:
    """Return a text, a number or a (nested) list of them as one clean text; "" for None.

    A text that is a list of texts as Python or JSON writes it, "['Good', '<b>pen</b>']", counts as that list.
    """
    texts, pending = [], [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str) and (parts := parse_list(part)) is not None:
            part = parts
        if isinstance(part, list | tuple):
            pending += reversed(part)
        elif part is not None and (text := clean_text(str(part))):
            texts.append(text)
    return separator.join(texts)


def parse_list(text: str) -> list | None:
    """Return the list of texts that a text writes out, None if it is another text, such as "[REC]" or "[1984]"."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            parts = parse(text)
            return parts if isinstance(parts, list) and all(map(_is_text, parts)) else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _is_text(part: object) -> bool:
    return part is None or isinstance(part, str) or isinstance(part, list | tuple) and all(map(_is_text, part))


def natural_title(title: str) -> str:
    """Move the article of a catalogue title to the front: 'Godfather, The (1972)' -> 'The Godfather (1972)'."""
    title, year = re.fullmatch(r"(.*?)( \(\d{4}\))?", title).groups()
    stem, comma, article = title.rpartition(", ")
    return (f"{article} {stem}" if comma and article in _ARTICLES else title) + (year or "")


def movie_description(year: str, kinds: list[str]) -> str:
    """Describe a movie by the year and genres of MovieLens, as a sentence."""
    parts = [f"Released in {year}" if year else "", f"Genres: {', '.join(kinds)}" if kinds else ""]
    return ". ".join(part for part in parts if part)
