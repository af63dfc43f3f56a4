"""Columns of raw tables: by the flags of `data.prepare`, else by the names that published tables use."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.raw_files import Table, header_of
from reclingua.utils.errors import InputError

# What a column contains -> the names that published tables give it, in order of preference.
NAMES = {
    "user": (
        "user", "user_id", "userId", "reviewer_id", "reviewerID", "customer_id", "visitorid", "uid", "session_id",
    ),
    "item": (
        "item", "item_id", "itemId", "product_id", "business_id", "parent_asin", "asin", "artist_id", "news_id",
        "movie_id", "movieId", "book_id", "track_id", "song_id", "game_id", "video_id", "recipe_id", "isbn", "sku",
        "iid",
    ),
    "time": ("timestamp", "time", "date", "datetime", "unixReviewTime", "review_date", "created_at"),
    "rating": ("rating", "stars", "overall", "score", "label", "click", "weight"),
    "items_id": ("id",),
    "title": ("title", "movie_title", "item_name", "app_name", "product_name", "name", "title:token_seq"),
    "description": ("description", "abstract", "summary", "overview"),
    "brand": ("brand", "store", "publisher", "author"),
    "categories": ("categories", "category", "genres", "genre", "class", "tags"),
}  # fmt: skip
FLAGS = {name: f"--{name}_column" for name in NAMES}


class Columns:
    """Columns of a table with a header: which one has the users, the items, ...

    Args:
        path: the table, for messages.
        names: its column names.
        args: arguments of `data.prepare`; a flag wins over the usual names.
    """

    def __init__(self, path: Path, names: list[str], args: argparse.Namespace):
        self.path, self.names, self.args = path, names, args

    def find(self, kind: str, preferred: Sequence[str | None] = ()) -> int | None:
        """Return the number of the column of a `kind` of NAMES, None if there is none.

        Args:
            preferred: names to look for before those of NAMES.

        Raises:
            InputError: a flag names a column that does not exist, or that exists twice.
        """
        return next(self._matches(kind, preferred), None)

    def find_all(self, kind: str) -> list[int]:
        """Return the numbers of all columns of a kind, the one of `find` first.

        Steam's table of games has both title and app_name, and each is empty for some games.
        """
        return list(dict.fromkeys(self._matches(kind)))

    def _matches(self, kind: str, preferred: Sequence[str | None] = ()) -> Iterator[int]:
        flag = getattr(self.args, f"{kind}_column")
        wanted = [flag] if flag is not None else [*filter(None, preferred), *NAMES[kind]]
        lowered, has_match = [name.casefold() for name in self.names], False
        for name in wanted:
            matches = [i for i, own in enumerate(self.names) if own == name.strip()]
            matches = matches or [i for i, own in enumerate(lowered) if own == name.strip().casefold()]
            if len(matches) > 1 and not has_match:
                raise InputError(f"{self.path}: has more than one column {name!r}; rename one of them")
            if len(matches) == 1:
                has_match = True
                yield matches[0]
        if flag is not None and not has_match:
            raise InputError(f"{self.path}: has no column {flag!r}; it has {self._listing()}; see {FLAGS[kind]}")

    def require(self, kind: str, preferred: Sequence[str | None] = ()) -> int:
        """Return the number of a column; InputError names the flag if there is none."""
        column = self.find(kind, preferred)
        if column is None:
            raise InputError(
                f"{self.path}: has no column {(*filter(None, preferred), *NAMES[kind])[0]!r} or of another usual name "
                f"for the {kind.replace('items_id', 'item')}; it has {self._listing()}; name it with {FLAGS[kind]}"
            )
        return column

    def require_time(self) -> int | None:
        """Return the number of the column of times, None for --time_column none."""
        if self.args.time_column == "none":
            return None
        column = self.find("time")
        if column is None:
            raise InputError(
                f"{self.path}: has no column of times; it has {self._listing()}; name it with --time_column, or give "
                "--time_column none if the order of the lines is the order in time"
            )
        return column

    def _listing(self) -> str:
        return ", ".join(self.names)[:300]


def ratings_columns(columns: Columns, rating_required: bool) -> tuple[str, str, str | None, str | None]:
    """Return the SQL names of user, item, time (None: order of the lines) and rating (None: there is none)."""
    user, item, time = columns.require("user"), columns.require("item"), columns.require_time()
    rating = columns.require("rating") if rating_required else columns.find("rating")
    return f"c{user}", f"c{item}", None if time is None else f"c{time}", None if rating is None else f"c{rating}"


def read_header(path: Path, args: argparse.Namespace, kinds: Sequence[str]) -> tuple[Table, Columns]:
    """Return a delimited file with a header as a table, and its columns.

    The delimiter is the one that splits the header into most columns of these kinds. DuckDB's detection would skip
    lines that do not match its guess.
    """
    encoding = args.encoding
    headers = header_of(path, ",;\t|", quoted=True, encoding=encoding)

    def num_found(delimiter: str) -> tuple[int, int]:
        names = {name.casefold() for name in headers[delimiter]}
        wanted = [[getattr(args, f"{kind}_column") or ""] + [*NAMES[kind]] for kind in kinds]
        return sum(any(name.strip().casefold() in names for name in choice) for choice in wanted), len(names)

    delimiter = max(headers, key=num_found)
    names = headers[delimiter]
    return Table(path, len(names), delimiter, quoted=True, encoding=encoding), Columns(path, names, args)


def read_atomic_header(path: Path, args: argparse.Namespace) -> tuple[Table, Columns]:
    """Return a RecBole atomic file as a table, and its columns; in the file a name has a type: `user_id:token`."""
    header = header_of(path, "\t", quoted=False, encoding=args.encoding)["\t"]
    names = [column.split(":")[0].strip() for column in header]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: has column {duplicate!r} twice; keep one")
    table = Table(path, len(names), "\t", padded=True, encoding=args.encoding)
    return table, Columns(path, names, args)
