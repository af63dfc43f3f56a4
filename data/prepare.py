"""Turn raw ratings into a dataset folder, for generating the next item or for telling what a user likes.

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
tab and line ends. Files are streamed: what does not fit into --memory_gb waits on the disk, beside the dataset.
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
from data.raw_files import NO_ROOM
from data.readers import SOURCES
from reclingua.datasets.ratings import COLUMNS, PARTS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_folder

WITH_IDS = "rated JOIN users ON u = users.number JOIN items_kept ON i = items_kept.number"


@contextmanager
def workspace(data_path: Path, memory_gb: float) -> Iterator[DuckDBPyConnection]:
    """A DuckDB database in a folder of its own beside the dataset, gone at the end."""
    place = next(folder for folder in (data_path, *data_path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=place) as folder:
            settings = {"memory_limit": f"{memory_gb}GB", "temp_directory": f"{folder}/spilled"}
            with duckdb.connect(f"{folder}/ratings.duckdb", config=settings) as con:
                con.execute("SET TimeZone = 'UTC'")
                yield con
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from None  # which DuckDB has caught
    except duckdb.OutOfMemoryException:
        raise InputError(f"--memory_gb {memory_gb:g} is too little for these files; give it more") from None
    except (OSError, *NO_ROOM) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{place}: the work in progress finds no room there ({reason}); see --data_path") from None


# ---- What both tasks do ----


def core_of(con: DuckDBPyConnection, args: argparse.Namespace, k: int, first_id: int, need_title: bool) -> int:
    """Leave the k-core and give ids; returns how many ratings that leaves out.

    InputError if nothing is left, or an item that the raw files do not tell of, or have no title of if `need_title`.
    """
    left_out = filter_core(con, k)
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
            raise InputError(f"{args.dataset}: item {item[:80]!r} has ratings but no line in the item file")
        raise InputError(f"{args.dataset}: item {item[:80]!r} has no title; give it one or take its ratings out")
    return left_out


def has_texts(args: argparse.Namespace) -> bool:
    """Whether the raw files tell of the items."""
    return args.source != "csv" or args.items_path is not None


def rows_of(con: DuckDBPyConnection, query: str) -> Iterator[tuple]:
    """The rows of a query as a stream."""
    cursor = con.cursor().execute(query)
    while rows := cursor.fetchmany(10_000):
        yield from rows


def item_texts(con: DuckDBPyConnection) -> Iterator[str]:
    """What the raw files tell of each item, a JSON object piece by piece."""
    before = "{\n"
    for item, texts in rows_of(con, "SELECT id, texts FROM items_kept JOIN items ON item = name ORDER BY id"):
        yield before + json.dumps({str(item): json.loads(texts)}, ensure_ascii=False, indent=1)[2:-2]
        before = ",\n"
    yield "\n}\n"


def id_lines(con: DuckDBPyConnection, table: str) -> Iterator[str]:
    """Which number each raw id got, a line each."""
    escaped = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for name, number in rows_of(con, f"SELECT name, id FROM {table} ORDER BY id"):
        yield f"{name.translate(escaped)}\t{number}\n"


def write_together(folder: Path, content: dict[str, Iterable[str] | pa.RecordBatchReader]) -> None:
    """The files of a dataset belong together: all of them take their places at the end, or none does."""
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


def report(con: DuckDBPyConnection, name: str, left_out: dict[str, int]) -> None:
    """What was read, what of it was left out and why, what is kept."""
    kept = num_ratings(con)
    users, items, *lengths = fetch_one(
        con,
        """
        SELECT count(*), (SELECT count(*) FROM items_kept), min(n), median(n), avg(n), max(n)
        FROM (SELECT count(*) AS n FROM rated GROUP BY u)""",
    )
    print(f"{name}: {kept + sum(left_out.values()):,} ratings read, {kept:,} kept")
    for why, count in left_out.items():
        if count:
            print(f"  left out: {count:,} ratings {why}")
    print(f"  users {users:,}   items {items:,}   density {kept / users / items:.2%}")
    print("  ratings a user: min {:,}, median {:,.0f}, mean {:,.1f}, max {:,}".format(*lengths))


# ---- The next item ----


def sequential(con: DuckDBPyConnection, args: argparse.Namespace, only_known: bool) -> None:
    """Histories in time order, LC-Rec's files."""
    name, k = args.dataset, args.min_interactions or 5
    left_out = {"of items without a title": number_ratings(con, only_known)}
    if args.start or args.end:
        had = data_span(con)
        first = args.start or pd.Timestamp.min
        end = args.end + pd.Timedelta(days=1) if args.end else pd.Timestamp.max
        left_out["from before --start or after --end"] = filter_window(con, first.timestamp(), end.timestamp())
        if not num_ratings(con):
            raise InputError(f"{name}: no ratings from --start to --end; {had}")
    left_out["there twice: same user, item and time"] = filter_duplicates(con, "u, i, timestamp")
    left_out[f"of users or items with fewer than {k}"] = core_of(con, args, k, first_id=0, need_title=False)

    folder = args.data_path / name
    content = {f"{name}.inter.json": histories(con)}
    if has_texts(args):
        content[f"{name}.item.json"] = item_texts(con)
    elif (folder / f"{name}.item.json").exists():
        raise InputError(
            f"{folder / f'{name}.item.json'}: is of other data, since no --items_path is given; take it away"
        )
    content |= {f"{name}.user2id": id_lines(con, "users"), f"{name}.item2id": id_lines(con, "items_kept")}
    write_together(output_folder(folder), content)
    report(con, name, left_out)
    print(f"  written to {folder}/")


def histories(con: DuckDBPyConnection) -> Iterator[str]:
    """Every user's items, oldest first and those of one second in the file's order, a JSON object piece by piece."""
    before = "{"
    rows = rows_of(con, f"SELECT users.id, items_kept.id FROM {WITH_IDS} ORDER BY users.id, place")
    for user, history in groupby(rows, key=lambda row: row[0]):
        yield f'{before}"{user}": {json.dumps([str(item) for _, item in history])}'
        before = ", "
    yield "}\n"


# ---- What a user likes ----


def time_window(last: float, start: pd.Timestamp | None, months: list[float]) -> list[pd.Timestamp]:
    """The four ends of train, valid and test: from `start` on, or the months up to that of `last` (seconds); UTC.

    A part of a month, as in 11 0.5 0.5, is that part of the days of the month it begins in.
    """
    if start is None:
        if any(length % 1 for length in months):
            raise InputError("--months with parts of a month needs --start")
        month = pd.to_datetime(last, unit="s").normalize().replace(day=1)
        ends = [month + pd.DateOffset(months=1) - pd.DateOffset(months=int(sum(months)))]
    else:
        ends = [pd.Timestamp(start)]
    for length in months:
        whole = ends[-1] + pd.DateOffset(months=int(length))
        ends.append(whole + (length % 1) * (whole + pd.DateOffset(months=1) - whole))
    return ends


def preference(con: DuckDBPyConnection, args: argparse.Namespace, only_known: bool) -> None:
    """Likes and dislikes split by time, the files of CoLLM, BinLLM and CoRA; ids start at 1."""
    name, k = args.dataset, args.min_interactions or 1
    unrated = "SELECT min(rowid) FROM ratings WHERE NOT coalesce(isfinite(rating), false)"
    if (row := fetch_one(con, unrated)[0]) is not None:
        raise InputError(
            f"{name}: interaction {row + 1:,} of the raw file has no rating to tell a like from a dislike"
        )
    left_out = {"of items without a title": number_ratings(con, only_known)}
    had = data_span(con)
    (last,) = fetch_one(con, "SELECT max(timestamp) FROM rated")
    ends = time_window(last, args.start, args.months)
    left_out[f"from outside {_span(ends[0], ends[-1])}"] = filter_window(
        con, ends[0].timestamp(), ends[-1].timestamp()
    )
    if not num_ratings(con):
        raise InputError(f"{name}: no ratings {_span(ends[0], ends[-1])}; {had}; see --start, --months")
    # Who rates an item again would find the answer in the history: the first rating counts.
    left_out["of what the user had rated before"] = filter_duplicates(con, "u, i")
    left_out[f"of users or items with fewer than {k}"] = core_of(con, args, k, first_id=1, need_title=True)
    make_parts(con, ends, args.liked_above)
    lines = []
    for part, (begin, end) in zip(PARTS, pairwise(ends), strict=True):
        count, liked, warm = fetch_one(con, f"SELECT count(*), avg(label), avg(not_cold) FROM {part}")
        if liked in (None, 0, 1):
            what = "no ratings" if not count else f"only ratings {'above' if liked else 'up to'} {args.liked_above:g}"
            raise InputError(
                f"{name}: {part}, {_span(begin, end)}, has {what}; {had}; see --start, --months, --liked_above"
            )
        lines.append(f"  {part:<5} {_span(begin, end)}: {count:>9,} ratings, {liked:.1%} liked, {1 - warm:.1%} cold")

    folder = output_folder(args.data_path / name)
    columns = ", ".join(COLUMNS)
    content = {}
    for part in PARTS:
        rows = con.cursor().sql(f"SELECT {columns} FROM {part} ORDER BY uid, place")
        content[f"{part}.parquet"] = rows.to_arrow_reader(100_000)
    content["item.json"] = item_texts(con)
    write_together(folder, content | {"user2id": id_lines(con, "users"), "item2id": id_lines(con, "items_kept")})
    report(con, name, left_out)
    print(*lines, f"  written to {folder}/", sep="\n")


def make_parts(con: DuckDBPyConnection, ends: list[pd.Timestamp], liked_above: float) -> None:
    """`rated` -> views train, valid, test with the columns of `data.preference`.

    A rating's history is what the user liked before it, whichever part that was in (CoLLM, section 4.1).
    """
    con.execute(f"""
        CREATE TABLE labelled AS SELECT users.id::INTEGER AS uid, items_kept.id::INTEGER AS iid, place,
            (rating > {liked_above!r})::TINYINT AS label, trunc(timestamp)::BIGINT AS timestamp,
            sum(label) OVER (PARTITION BY uid ORDER BY place) - label AS liked_before FROM {WITH_IDS}""")
    con.execute("""
        CREATE TABLE likes AS
        SELECT uid, list(iid ORDER BY place) AS liked FROM labelled WHERE label = 1 GROUP BY uid""")
    within = [
        f"timestamp >= {begin!r} AND timestamp < {end!r}" for begin, end in pairwise(when.timestamp() for when in ends)
    ]
    con.execute(f"CREATE TABLE seen AS SELECT DISTINCT uid, iid FROM labelled WHERE {within[0]}")
    for part, condition in zip(PARTS, within, strict=True):
        con.execute(f"""
            CREATE VIEW {part} AS SELECT labelled.*, coalesce(liked[:liked_before], []) AS his,
                (uid IN (SELECT uid FROM seen) AND iid IN (SELECT iid FROM seen))::TINYINT AS not_cold
            FROM labelled LEFT JOIN likes USING (uid) WHERE {condition}""")


def data_span(con: DuckDBPyConnection) -> str:
    """Which days the ratings are of."""
    first, last = fetch_one(con, "SELECT min(timestamp), max(timestamp) FROM rated")
    return f"the data has {_span(*(pd.to_datetime(when, unit='s') for when in (first, last)))}"


def _span(begin: pd.Timestamp, end: pd.Timestamp) -> str:
    return f"{begin:%Y-%m-%d} to {end - pd.Timedelta(seconds=1):%Y-%m-%d}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=("sequential", "preference"), default="sequential",
        help="histories to generate the next item from, or likes and dislikes split by time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=sorted(SOURCES), default="recbole", help="format of the raw files (default: %(default)s)"
    )
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--raw_path", type=Path,
        help="folder of the raw files, of csv the file of ratings (default: the recbole package's example)",
    )  # fmt: skip
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="where <dataset>/ goes (default: %(default)s)"
    )
    parser.add_argument(
        "--min_interactions", type=int,
        help="k of the k-core over users and items, within the window (default: 5, with --task preference 1)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="DAY",
        help="first day that counts, like 2001-06-01, UTC (default: the data's; of --task preference the last months)",
    )  # fmt: skip
    parser.add_argument("--memory_gb", type=float, default=4, help="what DuckDB may hold, GB (default: %(default)s)")
    of_sequential = parser.add_argument_group("--task sequential")
    of_sequential.add_argument("--end", metavar="DAY", help="last day that counts (default: the data's)")
    of_preference = parser.add_argument_group("--task preference")
    of_preference.add_argument(
        "--months", type=float, nargs=3, default=[10, 5, 5], metavar=("TRAIN", "VALID", "TEST"),
        help="months of each part; .5 is half the days of one (default: 10 5 5, the papers' for MovieLens-1M)",
    )  # fmt: skip
    of_preference.add_argument(
        "--liked_above", type=float, default=3, help="ratings above this count as liked (default: %(default)s)"
    )
    of_csv = parser.add_argument_group("--source csv", "Tables with a header, parted by , ; | or tabs, .gz or not")
    for name, default in (("user", "user"), ("item", "item"), ("time", "timestamp"), ("title", "title")):
        of_csv.add_argument(f"--{name}_column", default=default, help="(default: %(default)s)")
    of_csv.add_argument("--rating_column", help="needed by --task preference")
    of_csv.add_argument("--description_column", help="of the items' file (default: no descriptions)")
    of_csv.add_argument(
        "--time_unit", choices=("s", "ms"), default="s", help="s takes dates, too (default: %(default)s)"
    )
    of_csv.add_argument("--items_path", type=Path, help="file of the items' titles (default: no item texts)")

    args = one_line_errors(parser).parse_args()
    if args.min_interactions is not None and args.min_interactions < 1:
        raise InputError(f"--min_interactions {args.min_interactions}: should be 1 at least")
    if not all(0 < months <= 240 for months in args.months):
        raise InputError(f"--months {' '.join(f'{months:g}' for months in args.months)}: should be above 0, up to 240")
    if not 0.1 <= args.memory_gb < 10_000:
        raise InputError(f"--memory_gb {args.memory_gb:g}: should be 0.1 at least")
    if not math.isfinite(args.liked_above):
        raise InputError(f"--liked_above {args.liked_above:g}: should be a number")
    args.start, args.end = _day("--start", args.start), _day("--end", args.end)
    if args.raw_path is None and args.source != "recbole":
        raise InputError(
            f"--source {args.source} needs --raw_path, {'a file' if args.source == 'csv' else 'a folder'}"
        )
    if args.task == "preference":
        if args.end:
            raise InputError("--end is for --task sequential; see --months")
        if args.source == "csv" and not (args.rating_column and args.items_path):
            raise InputError("--task preference needs --rating_column and --items_path")
    return args


def _day(flag: str, text: str | None) -> pd.Timestamp | None:
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
        (preference if args.task == "preference" else sequential)(con, args, only_known)


if __name__ == "__main__":
    main()
