"""Prepare a dataset folder from raw ratings, for next-item or Yes/No prediction.

python -m data.prepare --source recbole --dataset ml-100k
python -m data.prepare --source recbole --dataset mydata --raw_path ~/raw/mydata --min_interactions 5
python -m data.prepare --source amazon2018 --dataset Books --raw_path ~/raw/Books --start 2016-10-01 --end 2018-10-31
python -m data.prepare --source amazon2014 --dataset Beauty --raw_path ~/raw/Beauty
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

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from data.filtering import (
    assign_ids,
    drop_negatives,
    fetch_one,
    filter_core,
    filter_duplicates,
    filter_window,
    has_labels,
    num_ratings,
    number_ratings,
)
from data.flags import parse_args
from data.ingestion import Ingestion
from data.published import PUBLISHED
from data.raw_files import DISK_ERRORS
from data.readers import SOURCES
from reclingua.datasets.derived_files import print_stale_files
from reclingua.datasets.interactions import read_id_map
from reclingua.datasets.item_texts import complete_titles, describe_untitled
from reclingua.datasets.ratings import COLUMNS, PARTS
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.files import atomic_files, output_folder

DOMINANT_SHARE = 0.05  # of all ratings; a user with more of them is shown
RATED_WITH_IDS = "rated JOIN users ON u = users.number JOIN items_kept ON i = items_kept.number"


@contextmanager
def workspace(data_path: Path, memory_gb: float) -> Iterator[tuple[DuckDBPyConnection, Path]]:
    """Open a DuckDB database in a temporary folder beside the dataset, deleted at the end; yield both.

    Raises:
        InputError: `memory_gb` or the disk space is too small.
    """
    parent = next(folder for folder in (data_path, *data_path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=parent) as folder:
            settings = {"memory_limit": f"{memory_gb}GB", "temp_directory": f"{folder}/spilled"}
            with duckdb.connect(f"{folder}/ratings.duckdb", config=settings) as con:
                con.execute("SET TimeZone = 'UTC'")
                yield con, Path(folder)
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


def reduce_to_core(ingestion: Ingestion, k: int, first_id: int, prefix: str) -> int:
    """Reduce the ratings to the k-core and assign ids; return the number of dropped ratings.

    Args:
        prefix: of the names of the id maps, whose ids are kept with --keep_ids.

    Raises:
        InputError: the core is empty, or a line of an id map is broken.
    """
    con = ingestion.con
    num_dropped = filter_core(con, k)
    if not num_ratings(con):
        raise InputError(f"{ingestion.args.dataset}: the {k}-core is empty; lower --min_interactions")
    known: dict[str, dict[str, int]] = {"users": {}, "items_kept": {}}
    for table, name in (("users", "user2id"), ("items_kept", "item2id")) if ingestion.args.keep_ids else ():
        path = ingestion.args.data_path / ingestion.args.dataset / f"{prefix}{name}"
        for number, raw_id in read_id_map(path).items():
            if not number.isdecimal():
                raise InputError(f"{path}: {raw_id[:50]!r} has {number[:50]!r}, no number; leave --keep_ids out")
            known[table][raw_id] = int(number)
    assign_ids(con, first_id, known)
    return num_dropped


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
    with atomic_files(folder, content) as temporaries:
        for name, pieces in content.items():
            temporary = temporaries[name]
            if isinstance(pieces, pa.RecordBatchReader):
                schema = pa.schema(COLUMNS.items())
                with pq.ParquetWriter(temporary, schema) as writer:
                    for batch in pieces:
                        writer.write_table(pa.Table.from_batches([batch]).cast(schema))
            else:
                with temporary.open("w", encoding="utf-8", newline="\n") as file:
                    file.writelines(pieces)


def print_summary(ingestion: Ingestion, dropped: dict[str, int]) -> None:
    """Print how many ratings were read, dropped (reason -> number) and kept, and statistics of the dataset."""
    con, name = ingestion.con, ingestion.args.dataset
    kept = num_ratings(con)
    users, items, *lengths = fetch_one(
        con,
        """
        SELECT count(*), (SELECT count(*) FROM items_kept), min(n), median(n), avg(n), max(n)
        FROM (SELECT count(*) AS n FROM rated GROUP BY u)""",
    )
    print(f"{name}: {kept + sum(dropped.values()):,} ratings read, {kept:,} kept")
    print(*(f"  {note}\n" for note in ingestion.notes), sep="", end="")
    for reason, count in dropped.items():
        if count:
            print(f"  dropped: {count:,} ratings {reason}")
    print(f"  users {users:,}   items {items:,}   density {kept / users / items:.2%}")
    print("  ratings per user: min {:,}, median {:,.0f}, mean {:,.1f}, max {:,}".format(*lengths))
    most, owner = lengths[-1], "SELECT name FROM users WHERE number = (SELECT mode(u) FROM rated)"
    if most > DOMINANT_SHARE * kept and most > 5 * lengths[1]:
        user = fetch_one(con, owner)[0]
        print(f"  user {user[:80]!r} has {most / kept:.1%} of all ratings; if it is no person, see --na_values")
    query = "SELECT id, texts FROM items_kept JOIN items ON item = name WHERE texts ->> '$.title' = ''"
    untitled = complete_titles({str(item): json.loads(texts) for item, texts in fetch_rows(con, query)})
    if untitled:
        print(f"  {describe_untitled(untitled.values())}, wherever the dataset is opened")


# ---- Next-item prediction ----


def prepare_sequential(ingestion: Ingestion) -> None:
    """Write histories in time order, the files of LC-Rec."""
    con, args = ingestion.con, ingestion.args
    name, k = args.dataset, args.min_interactions or 5
    dropped = {}
    if has_labels(con):
        dropped["with label 0: shown or asked, but not taken"] = drop_negatives(con)
    dropped["of items that the items file lacks"] = number_ratings(con, ingestion.has_texts)
    if args.start or args.end:
        span = data_span(con)
        first = args.start or pd.Timestamp.min
        end = args.end + pd.Timedelta(days=1) if args.end else pd.Timestamp.max
        dropped["before --start or after --end"] = filter_window(con, first.timestamp(), end.timestamp())
        if not num_ratings(con):
            raise InputError(f"{name}: no ratings from --start to --end; {span}")
    dropped["with user, item and time of another"] = filter_duplicates(con, "u, i, timestamp")
    dropped[f"of users or items with fewer than {k}"] = reduce_to_core(ingestion, k, 0, f"{name}.")

    folder = args.data_path / name
    content: dict[str, Iterable[str] | pa.RecordBatchReader] = {f"{name}.inter.json": history_texts(con)}
    if ingestion.has_texts:
        content[f"{name}.item.json"] = item_texts(con)
    elif (folder / f"{name}.item.json").exists():
        raise InputError(
            f"{folder / f'{name}.item.json'}: exists, but no --items_path is given; give it or move the file"
        )
    content |= {f"{name}.user2id": id_lines(con, "users"), f"{name}.item2id": id_lines(con, "items_kept")}
    write_files(output_folder(folder), content)
    print_summary(ingestion, dropped)
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


def prepare_preference(ingestion: Ingestion) -> None:
    """Write likes and dislikes split by time, the files of CoLLM, BinLLM and CoRA; ids start at 1."""
    con, args = ingestion.con, ingestion.args
    name, k = args.dataset, args.min_interactions or 1
    if not ingestion.has_texts:
        raise InputError(f"{name}: --task preference needs item texts; see --items_path, --source")
    liked_above = args.liked_above
    if liked_above is None:
        liked_above = 0.5 if has_labels(con) else 3
    dropped = {"of items that the items file lacks": number_ratings(con, only_known=True)}
    span = data_span(con)
    (last,) = fetch_one(con, "SELECT max(timestamp) FROM rated")
    boundaries = time_window(last, args.start, args.months)
    window = _format_span(boundaries[0], boundaries[-1])
    dropped[f"outside {window}"] = filter_window(con, boundaries[0].timestamp(), boundaries[-1].timestamp())
    if not num_ratings(con):
        raise InputError(f"{name}: no ratings {window}; {span}; see --start, --months")
    # Only the first rating of an item by a user counts: the history of a later one would contain the answer.
    dropped["of items that the user had rated before"] = filter_duplicates(con, "u, i")
    dropped[f"of users or items with fewer than {k}"] = reduce_to_core(ingestion, k, 1, "")
    create_parts(con, boundaries, liked_above)
    lines = []
    for part, (begin, end) in zip(PARTS, pairwise(boundaries), strict=True):
        count, liked, warm = fetch_one(con, f"SELECT count(*), avg(label), avg(not_cold) FROM {part}")
        period = _format_span(begin, end)
        if liked in (None, 0, 1):
            has = "no ratings" if not count else f"only ratings {'above' if liked else 'up to'} {liked_above:g}"
            raise InputError(f"{name}: {part}, {period}, has {has}; {span}; see --start, --months, --liked_above")
        lines.append(f"  {part:<5} {period}: {count:>9,} ratings, {liked:.1%} liked, {1 - warm:.1%} cold")

    folder = args.data_path / name
    columns = ", ".join(COLUMNS)
    content: dict[str, Iterable[str] | pa.RecordBatchReader] = {}
    for part in PARTS:
        rows = con.cursor().sql(f"SELECT {columns} FROM {part} ORDER BY uid, place")
        content[f"{part}.parquet"] = rows.to_arrow_reader(100_000)
    content["item.json"] = item_texts(con)
    write_files(folder, content | {"user2id": id_lines(con, "users"), "item2id": id_lines(con, "items_kept")})
    print_summary(ingestion, dropped)
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


@cli_main
def main() -> None:
    args = parse_args(__doc__)
    if args.source in PUBLISHED:
        publication = PUBLISHED[args.source](args)
        folder = args.data_path / args.dataset
        publication.check_inputs(folder)
        write_files(output_folder(folder), publication.content)
        print(f"{args.dataset}: {publication.summary}")
        print(*(f"  {note}" for note in publication.notes), f"  written to {folder}/", sep="\n")
        return
    with workspace(args.data_path, args.memory_gb) as (con, folder):
        ingestion = Ingestion(con, args, folder)
        SOURCES[args.source](ingestion)
        prepare = prepare_preference if args.task == "preference" else prepare_sequential
        prepare(ingestion)


if __name__ == "__main__":
    main()
