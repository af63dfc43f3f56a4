"""Items by title: what a person types into the search box of the page, and what is found."""

import unicodedata
from collections.abc import Mapping

from reclingua.utils.text import shorten

MOST_LETTERS = 100  # of a query that are read; nobody types more on purpose
SHOWN_LETTERS = 160  # of a title


def fold(text: str) -> str:
    """The text for comparison: without case, accents and runs of spaces."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in apart if not unicodedata.combining(letter)).split())


class Catalogue:
    """The items of a dataset, to be found by words of their titles, the popular ones first.

    Args:
        titles: item -> title.
        counts: item -> how often it was taken in training.
    """

    def __init__(self, titles: Mapping[str, str], counts: Mapping[str, int]):
        self.titles = titles
        popular = sorted(titles, key=lambda item: -counts.get(item, 0))
        self.folded = {item: fold(titles[item][:1000]) for item in popular}

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and item in self.titles

    def find(self, query: str, most: int = 6) -> list[str]:
        """Up to `most` items whose titles have every word of `query`; those that begin with it before the others."""
        wanted = fold(query[:MOST_LETTERS])
        words = wanted.split()
        found = [item for item, title in self.folded.items() if all(word in title for word in words)]
        return sorted(found, key=lambda item: not self.folded[item].startswith(wanted))[:most]

    def title(self, item: str) -> str:
        """The item's title, a long one cut."""
        return shorten(self.titles[item], SHOWN_LETTERS)
