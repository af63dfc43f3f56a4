"""Ingestion of raw files into DuckDB: the tables of ratings and items, and what is left out of them.

A line that cannot be used is left out, counted by reason and shown with its first example; a file in which more than
--max_bad_share of the lines are so is an error.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection

from data import values
from data.filtering import fetch_one
from data.raw_files import DISK_ERRORS, RawFile, excerpt, find_records, normalize
from reclingua.utils.errors import InputError

HINTS = {  # reason -> the flags that can make such lines readable
    "has no numeric rating": "see --rating_column, --decimal",
    "has no readable time": "see --time_column, --time_format",
    "has no user": "see --user_column, --na_values",
    "has no item": "see --item_column, --na_values",
    "is not in ": "give the --encoding of the file",
    "has an implausible time": "see --time_column, --time_unit, --time_format",
}


class LeftOut:
    """Lines of one raw file that cannot be used: reason -> number and first example."""

    def __init__(self, path: Path):
        self.path = path
        self.total = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, line: int, text: str, count: int = 1) -> None:
        """Count lines with this reason; the first call for a reason gives its example."""
        self.counts[reason] += count
        self.examples.setdefault(reason, f"line {line:,} {reason}: {excerpt(text)!r}")

    def check(self, max_bad_share: float) -> None:
        """Raise InputError if more than this share of the lines is left out."""
        num_bad = self.counts.total()
        if num_bad <= max_bad_share * self.total:
            return
        (reason, _), *others = self.counts.most_common(4)
        also = f" ({', '.join(f'{number:,} {other}' for other, number in others)})" if others else ""
        hint = next((HINTS[known] for known in HINTS if reason.startswith(known)), "repair the file")
        raise InputError(
            f"{self.path}: {self.examples[reason]}; {num_bad:,} of {self.total:,} lines cannot be used{also}, "
            f"more than --max_bad_share {max_bad_share:g}; {hint}"
        )

    def lines(self) -> list[str]:
        """Return a sentence for each reason, most frequent first."""
        return [
            f"left out: {count:,} of {self.total:,} lines of {self.path.name}; {self.examples[reason]}"
            for reason, count in self.counts.most_common()
        ]


class Ingestion:
    """Raw files on their way into the tables `ratings` and `items` of a DuckDB database.

    Args:
        con: the database.
        args: arguments of `data.prepare`.
        folder: folder for temporary files.
    """

    def __init__(self, con: DuckDBPyConnection, args: argparse.Namespace, folder: Path):
        self.con, self.args, self.folder = con, args, folder
        self.left_out: list[LeftOut] = []
        self.remarks: list[str] = []
        self.has_texts = False
        self.ratings_path: Path | None = None
        if args.time_format:
            values.check_time_format(con, args.time_format)

    @property
    def notes(self) -> list[str]:
        """Sentences on what was left out and on how values were understood."""
        return [line for left_out in self.left_out for line in left_out.lines()] + self.remarks

    def load(self, raw: RawFile, statement: Callable[[str], str]) -> LeftOut:
        """Run a statement on the rows of a raw file, given their SQL; return which lines cannot be read.

        Raises:
            InputError: the file is cut short, or DuckDB cannot read it although all of its records are well formed.
        """
        left_out = LeftOut(raw.path)
        self.left_out.append(left_out)
        if raw.encoding == "utf-8":
            try:
                self.con.execute(statement(raw.sql))
                return left_out
            except duckdb.OutOfMemoryException:
                raise
            except duckdb.Error as error:
                if isinstance(error, DISK_ERRORS) and raw.path.name not in str(error):
                    raise
        path = self.folder / f"{len(self.left_out)}.normalized"
        normalized, num_readable = normalize(
            raw, path, lambda record: left_out.add(record.fault, record.line, record.text)
        )
        left_out.total = num_readable + left_out.counts.total()
        try:
            self.con.execute(statement(normalized.sql))
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            if isinstance(error, DISK_ERRORS):
                raise
            raise InputError(f"{raw.path}: cannot be read ({str(error).partition(chr(10))[0][:300]})") from None
        path.unlink()
        return left_out

    def create_ratings(
        self,
        raw: RawFile,
        user: str,
        item: str,
        timestamp: str | None,
        rating: str | None = None,
        unit: str = "s",
        rating_required: bool = True,
    ) -> None:
        """Create the table `ratings` from SQL columns, without lines that lack a value.

        Args:
            timestamp: None: the order of the lines is the order in time.
            unit: unit of times that are numbers, unless --time_unit names another.
            rating_required: False: a rating that is no number is NULL.

        Raises:
            InputError: too many lines cannot be used, or the file has none that can.
        """
        args, con = self.args, self.con
        self.ratings_path = raw.path
        missing, decimal, unit = args.na_values, args.decimal, args.time_unit or unit
        rating_sql = values.number_sql(rating, missing, decimal) if rating else "NULL::DOUBLE"
        time_sql = values.time_sql(timestamp, missing, decimal, unit, args.time_format) if timestamp else "0::DOUBLE"
        columns = f"""{values.id_sql(user, missing, decimal)} AS user, {values.id_sql(item, missing, decimal)} AS item,
            {rating_sql} AS rating, {time_sql} AS timestamp"""
        left_out = self.load(raw, lambda source: f"CREATE TABLE ratings AS SELECT {columns} FROM {source}")
        left_out.total = left_out.counts.total() + fetch_one(con, "SELECT count(*) FROM ratings")[0]
        if not timestamp:
            con.execute("UPDATE ratings SET timestamp = rowid")
        elif unit == "s" and not args.time_unit and not args.time_format:
            self._read_compact_dates()
        earliest = self._earliest_time(unit) if timestamp else 0
        implausible = f"timestamp < {earliest} OR timestamp >= {values.LATEST}" if timestamp else "false"
        unrated = "NOT coalesce(isfinite(rating), false)" if rating_required and rating else "false"
        problem = f"""CASE
            WHEN user IS NULL THEN 'has no user'
            WHEN item IS NULL THEN 'has no item'
            WHEN {unrated} THEN 'has no numeric rating'
            WHEN NOT coalesce(isfinite(timestamp), false) THEN 'has no readable time'
            WHEN {implausible} THEN 'has an implausible time' END"""
        found = con.execute(f"""
            SELECT problem, count(*), min(place), arg_min(timestamp, place)
            FROM (SELECT {problem} AS problem, rowid AS place, timestamp FROM ratings)
            WHERE problem IS NOT NULL GROUP BY problem""").fetchall()
        records = find_records(raw, {place for _, _, place, _ in found})
        for reason, count, place, seconds in found:
            if reason == "has an implausible time":
                reason += f" ({values.describe_time(seconds, unit)})"
            record = records.get(place)
            left_out.add(reason, record.line if record else place + 1, record.text if record else "", count)
        left_out.check(args.max_bad_share)
        if earliest == 0 and timestamp and (args.task == "preference" or args.start or args.end):
            raise InputError(
                f"{raw.path}: {self.remarks[-1]}; --task preference, --start and --end need times: see --time_column, "
                "--time_format"
            )
        if found:
            con.execute(f"DELETE FROM ratings WHERE ({problem}) IS NOT NULL")
        if fetch_one(con, "SELECT count(*) FROM ratings") == (0,):
            raise InputError(f"{raw.path}: has no ratings; see --raw_path")

    def _read_compact_dates(self) -> None:
        """Read numbers like 20170715 as dates, if nearly all times are such numbers."""
        numbers = "FROM ratings WHERE isfinite(timestamp)"
        median, total = fetch_one(self.con, f"SELECT approx_quantile(timestamp, 0.5), count(*) {numbers}")
        digits = len(f"{median:.0f}") if total else 0
        if digits not in values.COMPACT_DATES or median < 1970 * 10 ** (digits - 4):
            return
        date = values.compact_date_sql("timestamp", digits)
        (num_dates,) = fetch_one(self.con, f"SELECT count({date}) {numbers}")
        if num_dates >= (1 - self.args.max_bad_share) * total:
            self.con.execute(f"UPDATE ratings SET timestamp = {date}")
            self.remarks.append(f"times are numbers of {digits} digits, read as dates {values.COMPACT_DATES[digits]}")

    def _earliest_time(self, unit: str) -> float:
        """Return the earliest plausible time: of small numbers, which are positions rather than times, 0."""
        query = "SELECT approx_quantile(timestamp, 0.5) FROM ratings WHERE isfinite(timestamp)"
        (median,) = fetch_one(self.con, query)
        if median is None or median >= values.EARLIEST or values.plausible_unit(median * values.UNITS[unit]):
            return values.EARLIEST
        number = median * values.UNITS[unit]
        self.remarks.append(f"times are small numbers, such as {number:.0f}, read as positions in an order")
        return 0

    def create_items(self, raw: RawFile, item: str, columns: list[str], describe: Callable[..., dict]) -> None:
        """Create the table `items` of rated items with the texts that `describe` returns for SQL columns.

        The first line of an item counts.

        Raises:
            InputError: too many lines cannot be used, or no rated item has a line.
        """
        marks = {*self.args.na_values}

        def texts(content: list[str]) -> str:
            known = ["" if text in marks else text for text in content]
            record = {key: "" if text in marks else text for key, text in describe(*known).items()}
            return json.dumps(record, ensure_ascii=False)

        self.con.create_function("texts_of", texts, ["VARCHAR[]"], "VARCHAR")
        content = ", ".join(f"coalesce({column}::VARCHAR, '')" for column in columns)
        name = values.id_sql(item, self.args.na_values, self.args.decimal)
        rated = "SELECT DISTINCT item FROM ratings"

        def statement(source: str) -> str:
            rows = f"SELECT {name} AS item, [{content}] AS content, row_number() OVER () AS line FROM {source}"
            return f"""CREATE TABLE described AS SELECT item, line,
                CASE WHEN item IS NOT NULL THEN texts_of(content) END AS texts
                FROM ({rows}) WHERE item IS NULL OR item IN ({rated})"""

        left_out = self.load(raw, statement)
        unnamed, first = fetch_one(self.con, "SELECT count(*), min(line) FROM described WHERE item IS NULL")
        if unnamed:
            records = find_records(raw, {first - 1})
            left_out.total = left_out.total or self._count_rows(raw)
            left_out.add("has no item", records[first - 1].line, records[first - 1].text, unnamed)
        left_out.check(self.args.max_bad_share)
        lines = "SELECT min(line) FROM described WHERE item IS NOT NULL GROUP BY item"
        self.con.execute(f"CREATE TABLE items AS SELECT item, texts FROM described WHERE line IN ({lines})")
        self.con.execute("DROP TABLE described")
        self.has_texts = True
        if fetch_one(self.con, "SELECT count(*) FROM items") == (0,):
            (num_items,) = fetch_one(self.con, "SELECT count(DISTINCT item) FROM ratings")
            name = self.ratings_path.name if self.ratings_path else ""
            raise InputError(
                f"{raw.path}: has a line for none of the {num_items:,} items of {name}; give files of the same "
                "dataset, and see --items_id_column"
            )

    def _count_rows(self, raw: RawFile) -> int:
        return fetch_one(self.con, f"SELECT count(*) FROM {raw.sql}")[0]

    def create_no_items(self) -> None:
        """Create an empty table `items`, of a dataset without texts."""
        self.con.execute("CREATE TABLE items (item VARCHAR, texts VARCHAR)")
