"""Prepare a dataset folder from raw ratings, for next-item or Yes/No prediction.

python -m data.prepare --source recbole --dataset ml-100k
python -m data.prepare --source recbole --dataset mydata --raw_path ~/raw/mydata --min_interactions 5
python -m data.prepare --source amazon2018 --dataset Books --raw_path ~/raw/Books --start 2016-10-01 --end 2018-10-31
python -m data.prepare --source amazon2023 --dataset Video_Games --raw_path ~/raw/Video_Games
python -m data.prepare --source csv --dataset shop --raw_path sales.csv --user_column customer --item_column sku \\
    --time_column sold_at --items_path catalogue.csv --title_column name
python -m data.prepare --task preference --source movielens --dataset ml-1m --raw_path ~/raw/ml-1m --start 2001-06-01
python -m data.prepare --task preference --source amazon2018 --dataset Books --raw_path ~/raw/Books \\
    --start 2017-01-01 --months 11 0.5 0.5 --liked_above 4 --min_interactions 21

--task sequential (LC-Rec) writes D.inter.json, D.item.json and the id maps D.user2id, D.item2id. --task preference
(CoLLM, BinLLM, CoRA) writes train.parquet, valid.parquet, test.parquet, item.json and the id maps user2id, item2id.
A line of an id map is a raw id, a tab and its number; in the raw id \\\\, \\t, \\n and \\r stand for a backslash, a
tab and line ends. Files are streamed; data beyond --memory_gb is spilled to the disk of the dataset.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby, pairwise
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from data.filtering import (
    assign_ids,
    fetch_one,
    filter_core,
    filter_duplicates,
    filter_window,
    num_ratings,
    number_ratings,
)
from data.raw_files import DISK_ERRORS
from data.readers import SOURCES
from reclingua.datasets.derived_files import print_stale_files
from reclingua.datasets.ratings import COLUMNS, PARTS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_folder

RATED_WITH_IDS = "rated JOIN users ON u = users.number JOIN items_kept ON i = items_kept.number"


@contextmanager
def workspace(data_path: Path, memory_gb: float) -> Iterator[DuckDBPyConnection]:
    """Open a DuckDB database in a temporary folder beside the dataset, deleted at the end.

    Raises:
        InputError: `memory_gb` or the disk space is too small.
    """
    parent = next(folder for folder in (data_path, *data_path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=parent) as folder:
            settings = {"memory_limit": f"{memory_gb}GB", "temp_directory": f"{folder}/spilled"}
            with duckdb.connect(f"{folder}/ratings.duckdb", config=settings) as con:
                con.execute("SET TimeZone = 'UTC'")
                yield con
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from None  # DuckDB has caught the signal
    except duckdb.OutOfMemoryException:
        raise InputError(f"--memory_gb {memory_gb:g} is too little for these files; give it more") from None
    except (OSError, *DISK_ERRORS) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{parent}: temporary files cannot be written ({reason}); see --data_path") from None


# ---- Shared by both tasks ----


def reduce_to_core(con: DuckDBPyConnection, args: argparse.Namespace, k: int, first_id: int, need_title: bool) -> int:
    """Reduce the ratings to the k-core and assign ids; return the number of dropped ratings.

    Raises:
        InputError: the core is empty, or an item has no texts, or no title if `need_title`.
    """
    num_dropped = filter_core(con, k)
    if not num_ratings(con):
        raise InputError(f"{args.dataset}: the {k}-core is empty; lower --min_interactions")
    assign_ids(con, first_id)
    kept = "items_kept LEFT JOIN items ON item = name"
    lacking = fetch_one(
        con,
        f"""SELECT name, texts IS NULL FROM {kept}
        WHERE texts IS NULL OR ({need_title} AND texts ->> '$.title' = '') ORDER BY id LIMIT 1""",
    )
    if lacking and has_texts(args):
        item, unknown = lacking
        if unknown:
            raise InputError(f"{args.dataset}: item {item[:80]!r} has ratings but no line in the item file; add one")
        raise InputError(f"{args.dataset}: item {item[:80]!r} has no title; add one or remove its ratings")
    return num_dropped


def has_texts(args: argparse.Namespace) -> bool:
    """Return whether the raw files include item texts."""
    return args.source != "csv" or args.items_path is not None


def fetch_rows(con: DuckDBPyConnection, query: str) -> Iterator[tuple]:
    """Yield the rows of a query as a stream."""
    cursor = con.cursor().execute(query)
    while rows := cursor.fetchmany(10_000):
        yield from rows


def item_texts(con: DuckDBPyConnection) -> Iterator[str]:
    """Yield the item texts as a JSON object, piece by piece."""
    separator = "{\n"
    for item, texts in fetch_rows(con, "SELECT id, texts FROM items_kept JOIN items ON item = name ORDER BY id"):
        yield separator + json.dumps({str(item): json.loads(texts)}, ensure_ascii=False, indent=1)[2:-2]
        separator = ",\n"
    yield "\n}\n"


def id_lines(con: DuckDBPyConnection, table: str) -> Iterator[str]:
    """Yield the lines of an id map, raw id and number."""
    escaped = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for name, number in fetch_rows(con, f"SELECT name, id FROM {table} ORDER BY id"):
        yield f"{name.translate(escaped)}\t{number}\n"


def write_files(folder: Path, content: dict[str, Iterable[str] | pa.RecordBatchReader]) -> None:
    """Write the files of a dataset atomically as a group: all of them are replaced at the end, or none."""
    with ExitStack() as files:
        for name, pieces in content.items():
            temporary = files.enter_context(atomic_write(folder / name))
            if isinstance(pieces, pa.RecordBatchReader):
                schema = pa.schema(COLUMNS.items())
                with pq.ParquetWriter(temporary, schema) as writer:
                    for batch in pieces:
                        writer.write_table(pa.Table.from_batches([batch]).cast(schema))
            else:
                with temporary.open("w", encoding="utf-8", newline="\n") as file:
                    file.writelines(pieces)


def print_summary(con: DuckDBPyConnection, name: str, dropped: dict[str, int]) -> None:
    """Print how many ratings were read, dropped (reason -> number) and kept, and statistics of the dataset."""
    kept = num_ratings(con)
    users, items, *lengths = fetch_one(
        con,
        """
        SELECT count(*), (SELECT count(*) FROM items_kept), min(n), median(n), avg(n), max(n)
        FROM (SELECT count(*) AS n FROM rated GROUP BY u)""",
    )
    print(f"{name}: {kept + sum(dropped.values()):,} ratings read, {kept:,} kept")
    for reason, count in dropped.items():
        if count:
            print(f"  dropped: {count:,} ratings {reason}")
    print(f"  users {users:,}   items {items:,}   density {kept / users / items:.2%}")
    print("  ratings per user: min {:,}, median {:,.0f}, mean {:,.1f}, max {:,}".format(*lengths))


# ---- Next-item prediction ----


def prepare_sequential(con: DuckDBPyConnection, args: argparse.Namespace, only_known: bool) -> None:
    """Write histories in time order, the files of LC-Rec."""
    name, k = args.dataset, args.min_interactions or 5
    dropped = {"of items without a title": number_ratings(con, only_known)}
    if args.start or args.end:
        span = data_span(con)
        first = args.start or pd.Timestamp.min
        end = args.end + pd.Timedelta(days=1) if args.end else pd.Timestamp.max
        dropped["before --start or after --end"] = filter_window(con, first.timestamp(), end.timestamp())
        if not num_ratings(con):
            raise InputError(f"{name}: no ratings from --start to --end; {span}")
    dropped["with user, item and time of another"] = filter_duplicates(con, "u, i, timestamp")
    dropped[f"of users or items with fewer than {k}"] = reduce_to_core(con, args, k, first_id=0, need_title=False)

    folder = args.data_path / name
    content: dict[str, Iterable[str] | pa.RecordBatchReader] = {f"{name}.inter.json": history_texts(con)}
    if has_texts(args):
        content[f"{name}.item.json"] = item_texts(con)
    elif (folder / f"{name}.item.json").exists():
        raise InputError(
            f"{folder / f'{name}.item.json'}: exists, but no --items_path is given; give it or move the file"
        )
    content |= {f"{name}.user2id": id_lines(con, "users"), f"{name}.item2id": id_lines(con, "items_kept")}
    write_files(output_folder(folder), content)
    print_summary(con, name, dropped)
    print(f"  written to {folder}/")
    print_stale_files(args.data_path, name)


def history_texts(con: DuckDBPyConnection) -> Iterator[str]:
    """Yield the histories as a JSON object, piece by piece: oldest first, within a second in the order of the file."""
    separator = "{"
    rows = fetch_rows(con, f"SELECT users.id, items_kept.id FROM {RATED_WITH_IDS} ORDER BY users.id, place")
    for user, history in groupby(rows, key=lambda row: row[0]):
        yield f'{separator}"{user}": {json.dumps([str(item) for _, item in history])}'
        separator = ", "
    yield "}\n"


# ---- Yes/No prediction ----


def time_window(last: float, start: pd.Timestamp | None, months: list[float]) -> list[pd.Timestamp]:
    """Return the four boundaries of train, valid and test, in UTC.

    Args:
        last: time of the last rating, seconds.
        start: first boundary; None: the last boundary is the end of the month of `last`.
        months: lengths of the parts; a fraction is that fraction of the days of the month it begins in.
    """
    if start is None:
        if any(length % 1 for length in months):
            raise InputError("--months with fractions needs --start")
        month = pd.to_datetime(last, unit="s").normalize().replace(day=1)
        boundaries = [month + pd.DateOffset(months=1) - pd.DateOffset(months=int(sum(months)))]
    else:
        boundaries = [pd.Timestamp(start)]
    for length in months:
        end = boundaries[-1] + pd.DateOffset(months=int(length))
        boundaries.append(end + (length % 1) * (end + pd.DateOffset(months=1) - end))
    return boundaries


def prepare_preference(con: DuckDBPyConnection, args: argparse.Namespace, only_known: bool) -> None:
    """Write likes and dislikes split by time, the files of CoLLM, BinLLM and CoRA; ids start at 1."""
    name, k = args.dataset, args.min_interactions or 1
    unrated = "SELECT min(rowid) FROM ratings WHERE NOT coalesce(isfinite(rating), false)"
    if (row := fetch_one(con, unrated)[0]) is not None:
        raise InputError(
            f"{name}: interaction {row + 1:,} of the raw file has no rating, which --task preference needs"
        )
    dropped = {"of items without a title": number_ratings(con, only_known)}
    span = data_span(con)
    (last,) = fetch_one(con, "SELECT max(timestamp) FROM rated")
    boundaries = time_window(last, args.start, args.months)
    window = _format_span(boundaries[0], boundaries[-1])
    dropped[f"outside {window}"] = filter_window(con, boundaries[0].timestamp(), boundaries[-1].timestamp())
    if not num_ratings(con):
        raise InputError(f"{name}: no ratings {window}; {span}; see --start, --months")
    # Only the first rating of an item by a user counts: the history of a later one would contain the answer.
    dropped["of items that the user had rated before"] = filter_duplicates(con, "u, i")
    dropped[f"of users or items with fewer than {k}"] = reduce_to_core(con, args, k, first_id=1, need_title=True)
    create_parts(con, boundaries, args.liked_above)
    lines = []
    for part, (begin, end) in zip(PARTS, pairwise(boundaries), strict=True):
        count, liked, warm = fetch_one(con, f"SELECT count(*), avg(label), avg(not_cold) FROM {part}")
        period = _format_span(begin, end)
        if liked in (None, 0, 1):
            has = "no ratings" if not count else f"only ratings {'above' if liked else 'up to'} {args.liked_above:g}"
            raise InputError(f"{name}: {part}, {period}, has {has}; {span}; see --start, --months, --liked_above")
        lines.append(f"  {part:<5} {period}: {count:>9,} ratings, {liked:.1%} liked, {1 - warm:.1%} cold")

    folder = output_folder(args.data_path / name)
    columns = ", ".join(COLUMNS)
    content: dict[str, Iterable[str] | pa.RecordBatchReader] = {}
    for part in PARTS:
        rows = con.cursor().sql(f"SELECT {columns} FROM {part} ORDER BY uid, place")
        content[f"{part}.parquet"] = rows.to_arrow_reader(100_000)
    content["item.json"] = item_texts(con)
    write_files(folder, content | {"user2id": id_lines(con, "users"), "item2id": id_lines(con, "items_kept")})
    print_summary(con, name, dropped)
    print(*lines, f"  written to {folder}/", sep="\n")


def create_parts(con: DuckDBPyConnection, boundaries: list[pd.Timestamp], liked_above: float) -> None:
    """Create views train, valid, test of `rated`, with the columns of `reclingua.datasets.ratings`.

    The history of a rating contains the items that the user liked before it, in any part (CoLLM, section 4.1). A
    rating is warm (`not_cold`) if its user and its item occur in train.
    """
    con.execute(f"""
        CREATE TABLE labelled AS SELECT users.id::INTEGER AS uid, items_kept.id::INTEGER AS iid, place,
            (rating > {liked_above!r})::TINYINT AS label, trunc(timestamp)::BIGINT AS timestamp,
            sum(label) OVER (PARTITION BY uid ORDER BY place) - label AS liked_before FROM {RATED_WITH_IDS}""")
    con.execute("""
        CREATE TABLE likes AS
        SELECT uid, list(iid ORDER BY place) AS liked FROM labelled WHERE label = 1 GROUP BY uid""")
    seconds = [boundary.timestamp() for boundary in boundaries]
    conditions = [f"timestamp >= {begin!r} AND timestamp < {end!r}" for begin, end in pairwise(seconds)]
    con.execute(f"CREATE TABLE seen AS SELECT DISTINCT uid, iid FROM labelled WHERE {conditions[0]}")
    for part, condition in zip(PARTS, conditions, strict=True):
        con.execute(f"""
            CREATE VIEW {part} AS SELECT labelled.*, coalesce(liked[:liked_before], []) AS his,
                (uid IN (SELECT uid FROM seen) AND iid IN (SELECT iid FROM seen))::TINYINT AS not_cold
            FROM labelled LEFT JOIN likes USING (uid) WHERE {condition}""")


def data_span(con: DuckDBPyConnection) -> str:
    """Return the first and last day of the ratings, for messages."""
    first, last = fetch_one(con, "SELECT min(timestamp), max(timestamp) FROM rated")
    return f"the data has {_format_span(pd.to_datetime(first, unit='s'), pd.to_datetime(last, unit='s'))}"


def _format_span(begin: pd.Timestamp, end: pd.Timestamp) -> str:
    return f"{begin:%Y-%m-%d} to {end - pd.Timedelta(seconds=1):%Y-%m-%d}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=("sequential", "preference"), default="sequential",
        help="histories for next-item prediction, or likes and dislikes split by time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=sorted(SOURCES), default="recbole", help="format of the raw files (default: %(default)s)"
    )
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--raw_path", type=Path,
        help="folder of the raw files; with --source csv file of ratings (default: example of the recbole package)",
    )  # fmt: skip
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument(
        "--min_interactions", type=int,
        help="k of the k-core of users and items, within the window (default: 5; 1 with --task preference)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="DAY",
        help="first day of the window, like 2001-06-01, UTC (default: all; with --task preference the last months)",
    )  # fmt: skip
    parser.add_argument("--memory_gb", type=float, default=4, help="memory limit of DuckDB, GB (default: %(default)s)")
    sequential = parser.add_argument_group("--task sequential")
    sequential.add_argument("--end", metavar="DAY", help="last day of the window (default: all)")
    preference = parser.add_argument_group("--task preference")
    preference.add_argument(
        "--months", type=float, nargs=3, default=[10, 5, 5], metavar=("TRAIN", "VALID", "TEST"),
        help="months of each part; .5 is half the days of a month (default: 10 5 5, the papers' for MovieLens-1M)",
    )  # fmt: skip
    preference.add_argument(
        "--liked_above", type=float, default=3, help="ratings above this value are likes (default: %(default)s)"
    )
    csv = parser.add_argument_group("--source csv", "Tables with a header, delimited by , ; | or tabs, .gz or not")
    for name, default in (("user", "user"), ("item", "item"), ("time", "timestamp"), ("title", "title")):
        csv.add_argument(f"--{name}_column", default=default, help=f"column of the {name} (default: %(default)s)")
    csv.add_argument("--rating_column", help="column of the rating, required by --task preference")
    csv.add_argument("--description_column", help="column of the description (default: no descriptions)")
    csv.add_argument(
        "--time_unit", choices=("s", "ms"), default="s",
        help="unit of times; s: seconds or dates, ms: milliseconds (default: %(default)s)",
    )  # fmt: skip
    csv.add_argument("--items_path", type=Path, help="file of item titles (default: no item texts)")
    return parser


def parse_args() -> argparse.Namespace:
    args = one_line_errors(build_parser()).parse_args()
    if args.min_interactions is not None and args.min_interactions < 1:
        raise InputError(f"--min_interactions {args.min_interactions}: should be at least 1")
    if not all(0 < months <= 240 for months in args.months):
        raise InputError(f"--months {' '.join(f'{months:g}' for months in args.months)}: should be above 0, up to 240")
    if not 0.1 <= args.memory_gb < 10_000:
        raise InputError(f"--memory_gb {args.memory_gb:g}: should be at least 0.1")
    if not math.isfinite(args.liked_above):
        raise InputError(f"--liked_above {args.liked_above:g}: should be a number")
    args.start, args.end = _parse_day("--start", args.start), _parse_day("--end", args.end)
    if args.raw_path is None and args.source != "recbole":
        raise InputError(
            f"--source {args.source} needs --raw_path, {'a file' if args.source == 'csv' else 'a folder'}"
        )
    if args.task == "preference":
        if args.end:
            raise InputError("--end has no effect with --task preference; see --months")
        if args.source == "csv" and not (args.rating_column and args.items_path):
            raise InputError("--task preference needs --rating_column and --items_path")
    return args


def _parse_day(flag: str, text: str | None) -> pd.Timestamp | None:
    if text is None:
        return None
    day = pd.to_datetime(text, format="%Y-%m-%d", errors="coerce")
    if pd.isna(day) or day.year > 2200:
        raise InputError(f"{flag} {text}: should be a day, like 2001-06-01")
    return day


@cli_main
def main() -> None:
    args = parse_args()
    with workspace(args.data_path, args.memory_gb) as con:
        only_known = SOURCES[args.source](con, args)
        prepare = prepare_preference if args.task == "preference" else prepare_sequential
        prepare(con, args, only_known)


if __name__ == "__main__":
    main()
