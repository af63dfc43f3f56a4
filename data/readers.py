"""Readers of published raw data: streams of files -> two DuckDB tables.

Every reader takes a connection and the arguments of `data.prepare`, creates the tables
    ratings: user, item (VARCHAR), rating (DOUBLE, NULL if missing), timestamp (DOUBLE, seconds); rowid is the order of
        the file;
    items: item (VARCHAR) and texts (a JSON object: title, description, other texts), rated items only;
and returns whether ratings of items that are not in `items` are dropped instead of an error.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from duckdb import DuckDBPyConnection

from data.cleaning import clean_text, movie_description, natural_title
from data.filtering import fetch_one
from data.raw_files import JsonLines, Table, execute_on_file, header_of, line_of, require_file
from reclingua.utils.errors import InputError

# trim: DuckDB pushes a bare try_cast into its CSV reader, which fails instead of returning NULL.
NUMBER = "try_cast(trim({0}) AS DOUBLE)"
SECONDS = NUMBER
MILLISECONDS = f"{NUMBER} / 1000"
# A number of seconds, or a date and time, in UTC without a time zone.
SECONDS_OR_DATE = f"coalesce({NUMBER}, epoch(try_cast(trim({{0}}) AS TIMESTAMPTZ)))"
LATEST = 2**33  # seconds: the year 2242; in milliseconds: April 1970


def read_recbole(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Read RecBole atomic files `D.inter` and `D.item`: tab separated, `column:type` headers, no quotes."""
    folder = args.raw_path or packaged_example(args.dataset)
    raw, names = _atomic(folder / f"{args.dataset}.inter", ["user_id", "item_id", "timestamp"])
    rating = f"c{names.index('rating')}" if "rating" in names else None
    columns = (f"c{names.index(name)}" for name in ("user_id", "item_id", "timestamp"))
    _create_ratings(con, raw, *columns, rating, rating_required=False)

    raw, names = _atomic(folder / f"{args.dataset}.item", ["item_id"])
    title = next((name for name in names if name.endswith("title")), None)
    if title is None:
        raise InputError(f"{raw.path}: has no column whose name ends in 'title'; add one")

    def describe(*values: str) -> dict[str, str]:
        record = dict(zip(names, map(clean_text, values), strict=True))
        description = record.get("description")
        if description is None:
            description = movie_description(record.get("release_year", ""), record.get("class", "").split())
        texts = {"title": natural_title(record[title]), "description": description}
        return texts | {name: text for name, text in record.items() if name not in (*texts, "item_id", title)}

    _create_items(con, raw, f"c{names.index('item_id')}", [f"c{i}" for i in range(len(names))], describe)
    return False


def read_movielens(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Read MovieLens: `ratings.dat`, `movies.dat` (1M, 10M), or `ratings.csv`, `movies.csv` (20M, 25M, 32M)."""
    path = _first_of(args.raw_path, ["ratings.dat", "ratings.csv"])
    movies_path = require_file(path.with_name(path.name.replace("ratings", "movies")))
    if path.suffix == ".dat":
        ratings, columns = Table(path, 4, "::", header=False), ["c0", "c1", "c3", "c2"]
        encoding = "utf-8" if _is_utf8(movies_path) else "latin-1"  # 10M, and 1M
        movies, item, *texts = Table(movies_path, 3, "::", header=False, encoding=encoding), "c0", "c1", "c2"
    else:
        ratings, columns = _csv(path, ["userId", "movieId", "timestamp", "rating"])
        movies, (item, *texts) = _csv(movies_path, ["movieId", "title", "genres"])
    _create_ratings(con, ratings, *columns)

    def describe(title: str, genres: str) -> dict[str, str]:
        genres = "" if genres == "(no genres listed)" else clean_text(genres).replace("|", " ")
        return {
            "title": natural_title(clean_text(title)),
            "description": movie_description("", genres.split()),
            "class": genres,
        }

    _create_items(con, movies, item, texts, describe)
    return False


def read_amazon2018(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Read Amazon reviews of 2018, JSON lines: `D.json(.gz)` or `D_5.json(.gz)`, and `meta_D.json(.gz)`.

    Item texts are title and description. Ratings of items without a title are dropped.
    """
    name = args.dataset
    path = _first_of(args.raw_path, [f"{name}.json.gz", f"{name}.json", f"{name}_5.json.gz", f"{name}_5.json"])
    meta_path = _first_of(args.raw_path, [f"meta_{name}.json.gz", f"meta_{name}.json"])
    fields = ("reviewerID", "asin", "unixReviewTime", "overall")
    _create_ratings(con, JsonLines(path, fields), *fields)

    def describe(title: str, description: str) -> dict[str, str]:
        title = _clean_json(title)
        # For some pages the crawler saved a script instead of the title.
        return {"title": "" if "getTime()" in title else title, "description": _clean_json(description)}

    fields = ("asin", "title", "description")
    _create_items(con, JsonLines(meta_path, fields, as_json=True), "asin ->> '$'", fields[1:], describe)
    return _drop_untitled(con, path, meta_path)


def read_amazon2023(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Read Amazon reviews of 2023, JSON lines: `D.jsonl(.gz)` with times in milliseconds, and `meta_D.jsonl(.gz)`.

    Items are parent products. Item texts are title, description (or else the features), categories and store. Ratings
    of items without a title are dropped.
    """
    path = _first_of(args.raw_path, [f"{args.dataset}.jsonl.gz", f"{args.dataset}.jsonl"])
    meta_path = _first_of(args.raw_path, [f"meta_{args.dataset}.jsonl.gz", f"meta_{args.dataset}.jsonl"])
    fields = ("user_id", "parent_asin", "timestamp", "rating")
    _create_ratings(con, JsonLines(path, fields), *fields, time=MILLISECONDS)

    def describe(title: str, description: str, features: str, categories: str, store: str) -> dict[str, str]:
        return {
            "title": _clean_json(title),
            "description": _clean_json(description) or _clean_json(features),
            "categories": _clean_json(categories, ", "),
            "store": _clean_json(store),
        }

    fields = ("parent_asin", "title", "description", "features", "categories", "store")
    _create_items(con, JsonLines(meta_path, fields, as_json=True), "parent_asin ->> '$'", fields[1:], describe)
    return _drop_untitled(con, path, meta_path)


def read_csv(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Read tables with a header: ratings from --raw_path, item texts from --items_path, if any.

    Times are seconds, milliseconds with --time_unit ms, or dates. Ratings of items without a title are dropped.
    """
    rating = [args.rating_column] if args.rating_column else []
    raw, columns = _csv(args.raw_path, [args.user_column, args.item_column, args.time_column, *rating])
    _create_ratings(con, raw, *columns, time=MILLISECONDS if args.time_unit == "ms" else SECONDS_OR_DATE)
    if args.items_path is None:
        con.execute("CREATE TABLE items (item VARCHAR, texts VARCHAR)")
        return False

    description = [args.description_column] if args.description_column else []
    raw, (item, *texts) = _csv(args.items_path, [args.item_column, args.title_column, *description])

    def describe(title: str, description: str = "") -> dict[str, str]:
        return {"title": clean_text(title), "description": clean_text(description)}

    _create_items(con, raw, item, texts, describe)
    return _drop_untitled(con, args.raw_path, args.items_path)


SOURCES = {
    "recbole": read_recbole,
    "movielens": read_movielens,
    "amazon2018": read_amazon2018,
    "amazon2023": read_amazon2023,
    "csv": read_csv,
}


# ---- Shared by the readers ----


def _create_ratings(
    con: DuckDBPyConnection,
    raw: JsonLines | Table,
    user: str,
    item: str,
    timestamp: str,
    rating: str | None = None,
    time: str = SECONDS,
    rating_required: bool = True,
) -> None:
    """Create the table `ratings` from SQL columns; InputError names the first line with a missing or invalid value.

    Args:
        time: SQL template that converts a timestamp to seconds.
        rating_required: False: a rating that is no number is NULL.
    """
    rating_sql = NUMBER.format(rating) if rating else "NULL::DOUBLE"
    columns = f"{user} AS user, {item} AS item, {rating_sql} AS rating, {time.format(timestamp)} AS timestamp"
    execute_on_file(con, f"CREATE TABLE ratings AS SELECT {columns} FROM {raw.sql}", raw)

    unit, other, remedy, earliest = ("seconds", "milliseconds", "divide", -LATEST)
    if time == MILLISECONDS:
        unit, other, remedy, earliest = ("milliseconds", "seconds", "multiply", LATEST / 1000)
    unrated = "NOT coalesce(isfinite(rating), false)" if rating_required and rating else "false"
    invalid = fetch_one(
        con,
        f"""
        SELECT * FROM (
            SELECT rowid, timestamp, CASE
                WHEN coalesce(user, '') = '' THEN 'user'
                WHEN coalesce(item, '') = '' THEN 'item'
                WHEN {unrated} THEN 'numeric rating'
                WHEN NOT coalesce(isfinite(timestamp), false) THEN 'numeric timestamp'
                WHEN timestamp NOT BETWEEN {earliest} AND {LATEST} THEN 'unit'
            END AS problem FROM ratings
        ) WHERE problem IS NOT NULL ORDER BY rowid LIMIT 1""",
    )
    if invalid is not None:
        row, value, problem = invalid
        location = f"{raw.path}: {line_of(raw, row)}"
        if problem != "unit":
            raise InputError(f"{location} has no {problem}; add it or remove the line")
        value *= 1000 if time == MILLISECONDS else 1
        raise InputError(
            f"{location}: timestamp {value:.0f} is no number of {unit} since 1970; is it in {other}? {remedy} by 1000"
        )
    if fetch_one(con, "SELECT count(*) FROM ratings") == (0,):
        raise InputError(f"{raw.path}: has no ratings; see --raw_path")


def _create_items(
    con: DuckDBPyConnection, raw: JsonLines | Table, item: str, columns: list[str], describe: Callable[..., dict]
) -> None:
    """Create the table `items` of rated items with the texts that `describe` returns for SQL columns.

    The first line of an item counts.
    """

    def texts(values: list[str]) -> str:
        return json.dumps(describe(*values), ensure_ascii=False)

    con.create_function("texts_of", texts, ["VARCHAR[]"], "VARCHAR")
    values = ", ".join(f"coalesce({column}::VARCHAR, '')" for column in columns)
    rows = f"SELECT {item} AS item, [{values}] AS content, row_number() OVER () AS line FROM {raw.sql}"
    rated = "item IN (SELECT DISTINCT item FROM ratings)"
    selection = f"SELECT item, line, texts_of(content) AS texts FROM ({rows}) WHERE {rated}"
    execute_on_file(con, f"CREATE TABLE described AS {selection}", raw)
    first = "line IN (SELECT min(line) FROM described GROUP BY item)"
    con.execute(f"CREATE TABLE items AS SELECT item, texts FROM described WHERE {first}")
    con.execute("DROP TABLE described")


def _drop_untitled(con: DuckDBPyConnection, path: Path, items_path: Path) -> bool:
    """Delete items without a title, which no prompt can name; return True."""
    con.execute("DELETE FROM items WHERE texts ->> '$.title' = ''")
    if fetch_one(con, "SELECT count(*) FROM items") == (0,):
        (rated,) = fetch_one(con, "SELECT count(DISTINCT item) FROM ratings")
        raise InputError(
            f"{items_path}: has a title for none of the {rated:,} items of {path.name}; give files of the same dataset"
        )
    return True


def _atomic(path: Path, required: list[str]) -> tuple[Table, list[str]]:
    """Return a RecBole atomic file as a table, and its column names without types."""
    names = [column.split(":")[0] for column in header_of(path, "\t", quoted=False)["\t"]]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: has column {duplicate!r} twice; keep one")
    if missing := next((name for name in required if name not in names), None):
        raise InputError(f"{path}: has no column {missing!r}; it has {', '.join(names)[:300]}")
    return Table(path, len(names), "\t", padded=True), names


def _csv(path: Path, required: list[str]) -> tuple[Table, list[str]]:
    """Return a delimited file as a table, and the SQL names of the `required` columns.

    The delimiter is the one that splits the header into most of these columns. DuckDB's detection would skip lines
    that do not match its guess.
    """
    headers = header_of(path, ",;\t|", quoted=True)
    delimiter = max(headers, key=lambda d: (sum(name in headers[d] for name in required), len(headers[d])))
    names = headers[delimiter]
    if wrong := next((name for name in required if names.count(name) != 1), None):
        problem = "has more than one column" if wrong in names else "has no column"
        raise InputError(f"{path}: {problem} {wrong!r}; it has {', '.join(names)[:300]}; see --help")
    return Table(path, len(names), delimiter, quoted=True), [f"c{names.index(name)}" for name in required]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _first_of(folder: Path, names: list[str]) -> Path:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: has none of {', '.join(names)}; see --raw_path")
    return path


def _clean_json(value: str, separator: str = " ") -> str:
    """Return a JSON field, a text or a list of texts, as one clean text."""
    content = json.loads(value) if value else ""
    if isinstance(content, list):
        return separator.join(filter(None, (clean_text(str(part)) for part in content if part is not None)))
    return clean_text(str("" if content is None else content))


def packaged_example(name: str) -> Path:
    """Return the folder of example dataset `name` inside the recbole package, without importing the package."""
    pattern = f"dataset_example/{name}/{name}.inter"
    try:
        paths = [file.locate() for file in files("recbole") or [] if file.match(pattern)]
    except PackageNotFoundError:
        raise InputError(
            "the recbole package is not installed: pip install --no-deps -r requirements-assets.txt"
        ) from None
    if not paths:
        raise InputError(f"the recbole package has no example dataset {name!r}; name a folder with --raw_path")
    return Path(paths[0]).parent
