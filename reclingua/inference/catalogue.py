"""Catalogue of items: full-text search in their titles, for the demo and the server."""

import unicodedata
from collections.abc import Mapping

from reclingua.utils.text import shorten

MAX_QUERY_LENGTH = 100  # letters of a query that are read
MAX_TITLE_LENGTH = 160  # letters of a title that are shown


def normalize_text(text: str) -> str:
    """Return the text for comparison: case-folded, without accents, runs of spaces collapsed."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in decomposed if not unicodedata.combining(letter)).split())


class Catalogue:
    """Items of a dataset, searchable by words of their titles, popular ones first.

    Args:
        titles: item -> title.
        counts: item -> interactions in training.
    """

    def __init__(self, titles: Mapping[str, str], counts: Mapping[str, int]):
        self.titles = titles
        by_popularity = sorted(titles, key=lambda item: -counts.get(item, 0))
        self.normalized = {item: normalize_text(titles[item][:1000]) for item in by_popularity}

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and item in self.titles

    def find(self, query: str, limit: int = 6) -> list[str]:
        """Return up to `limit` items whose titles contain every word of `query`, titles that start with it first."""
        prefix = normalize_text(query[:MAX_QUERY_LENGTH])
        words = prefix.split()
        matches = [item for item, title in self.normalized.items() if all(word in title for word in words)]
        return sorted(matches, key=lambda item: not self.normalized[item].startswith(prefix))[:limit]

    def title(self, item: str) -> str:
        """Return the title of an item, shortened to MAX_TITLE_LENGTH."""
        return shorten(self.titles[item], MAX_TITLE_LENGTH)
