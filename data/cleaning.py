"""What catalogues hold, made readable: no HTML, no entities, one space where there were many."""

import html
import re

# With its semicolon, so that the company R&D stays what it is.
_ENTITY = re.compile(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_UNSEEN = re.compile(r"<!--.*?(-->|$)|<(script|style)\b[^<>]*>.*?(</\2\s*>|$)", re.DOTALL | re.IGNORECASE)
_WITHIN_WORDS = re.compile(
    r"</?(a|abbr|b|big|em|font|i|mark|s|small|span|strong|sub|sup|u)(\s[^<>]*)?/?>", re.IGNORECASE
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<![^<>]*>")
_ARTICLES = {"The", "A", "An", "La", "Le", "Les", "Il", "Das"}


def clean_text(text: str) -> str:
    """Text as a reader of the page would see it, in one line.

    Entities are decoded until none is left, since shops escape twice ('&amp;amp;'). Tags go, those that may stand in
    a word without a space; comments, scripts and style sheets go with what they hold. 'a < b' and '<3' are no tags.
    """
    while (plain := _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)) != text:
        text = plain
    if "<" in text:
        text = _TAG.sub(" ", _WITHIN_WORDS.sub("", _UNSEEN.sub(" ", text)))
    return " ".join(text.split())


def natural_title(title: str) -> str:
    """Catalogues sort by the noun: 'Godfather, The' reads 'The Godfather'; a year behind it stays there."""
    title, year = re.fullmatch(r"(.*?)( \(\d{4}\))?", title).groups()
    stem, comma, article = title.rpartition(", ")
    return (f"{article} {stem}" if comma and article in _ARTICLES else title) + (year or "")


def movie_description(year: str, kinds: list[str]) -> str:
    """The columns that MovieLens has beside the title, as a sentence."""
    parts = [f"Released in {year}" if year else "", f"Genres: {', '.join(kinds)}" if kinds else ""]
    return ". ".join(part for part in parts if part)
