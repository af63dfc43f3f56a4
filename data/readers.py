"""Raw data in the formats it is published in -> two DuckDB tables, read as a stream.

Every reader takes a connection and the arguments of `data.prepare`, makes the tables
    ratings: user, item (VARCHAR), rating (DOUBLE, NULL where there is none), timestamp (DOUBLE, seconds); its rowid is
        the file's order;
    items: item (VARCHAR) and texts (a JSON object: title, description, what else the files tell), of rated items only;
and returns whether ratings of items that are not in `items` are to be left out rather than an error.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from duckdb import DuckDBPyConnection

from data.cleaning import clean_text, movie_description, natural_title
from data.filtering import fetch_one
from data.raw_files import JsonLines, Table, existing, header_of, line_of, load
from reclingua.utils.errors import InputError

# trim: DuckDB's CSV reader takes a bare try_cast upon itself, and then fails where it should give NULL.
NUMBER = "try_cast(trim({0}) AS DOUBLE)"
SECONDS = NUMBER
MILLISECONDS = f"{NUMBER} / 1000"
# A number of seconds, or a day and a time of day (of Greenwich where it names no zone).
SECONDS_OR_DATE = f"coalesce({NUMBER}, epoch(try_cast(trim({{0}}) AS TIMESTAMPTZ)))"
LATEST = 2**33  # seconds: the year 2242; milliseconds have passed it since April 1970


def read_recbole(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """RecBole atomic files `D.inter` and `D.item`: tab separated, `column:type` headers, no quotes."""
    folder = args.raw_path or packaged_example(args.dataset)
    raw, names = _atomic(folder / f"{args.dataset}.inter", ["user_id", "item_id", "timestamp"])
    rating = f"c{names.index('rating')}" if "rating" in names else None
    _make_ratings(
        con, raw, *(f"c{names.index(n)}" for n in ("user_id", "item_id", "timestamp")), rating, may_lack=True
    )

    raw, names = _atomic(folder / f"{args.dataset}.item", ["item_id"])
    title = next((name for name in names if name.endswith("title")), None)
    if title is None:
        raise InputError(f"{raw.path}: has no column whose name ends in 'title'")

    def describe(*values: str) -> dict[str, str]:
        record = dict(zip(names, map(clean_text, values), strict=True))
        description = record.get("description")
        if description is None:
            description = movie_description(record.get("release_year", ""), record.get("class", "").split())
        texts = {"title": natural_title(record[title]), "description": description}
        return texts | {name: text for name, text in record.items() if name not in (*texts, "item_id", title)}

    _make_items(con, raw, f"c{names.index('item_id')}", [f"c{i}" for i in range(len(names))], describe)
    return False


def read_movielens(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """MovieLens: `ratings.dat`, `movies.dat` of 1M and 10M, or `ratings.csv`, `movies.csv` of 20M, 25M and 32M."""
    path = _first_of(args.raw_path, ["ratings.dat", "ratings.csv"])
    movies_path = existing(path.with_name(path.name.replace("ratings", "movies")))
    if path.suffix == ".dat":
        ratings, columns = Table(path, 4, "::", header=False), ["c0", "c1", "c3", "c2"]
        encoding = "utf-8" if _is_utf8(movies_path) else "latin-1"  # 10M, and 1M
        movies, item, *texts = Table(movies_path, 3, "::", header=False, encoding=encoding), "c0", "c1", "c2"
    else:
        ratings, columns = _csv(path, ["userId", "movieId", "timestamp", "rating"])
        movies, (item, *texts) = _csv(movies_path, ["movieId", "title", "genres"])
    _make_ratings(con, ratings, *columns)

    def describe(title: str, kinds: str) -> dict[str, str]:
        kinds = "" if kinds == "(no genres listed)" else clean_text(kinds).replace("|", " ")
        return {
            "title": natural_title(clean_text(title)),
            "description": movie_description("", kinds.split()),
            "class": kinds,
        }

    _make_items(con, movies, item, texts, describe)
    return False


def read_amazon2018(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Amazon reviews of 2018, JSON lines: `D.json(.gz)` or `D_5.json(.gz)`, and `meta_D.json(.gz)`.

    The items' texts are title and description. Ratings of items without a title are left out.
    """
    name = args.dataset
    path = _first_of(args.raw_path, [f"{name}.json.gz", f"{name}.json", f"{name}_5.json.gz", f"{name}_5.json"])
    meta_path = _first_of(args.raw_path, [f"meta_{name}.json.gz", f"meta_{name}.json"])
    fields = ("reviewerID", "asin", "unixReviewTime", "overall")
    _make_ratings(con, JsonLines(path, fields), *fields)

    def describe(title: str, description: str) -> dict[str, str]:
        title = _plain(title)
        # Of some pages the collectors caught a script instead of the title.
        return {"title": "" if "getTime()" in title else title, "description": _plain(description)}

    fields = ("asin", "title", "description")
    _make_items(con, JsonLines(meta_path, fields, as_json=True), "asin ->> '$'", fields[1:], describe)
    return _only_titled(con, path, meta_path)


def read_amazon2023(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Amazon reviews of 2023, JSON lines: `D.jsonl(.gz)` with times in milliseconds, and `meta_D.jsonl(.gz)`.

    Items are parent products. Their texts are title, description (the features where there is none), categories and
    store. Ratings of items without a title are left out.
    """
    path = _first_of(args.raw_path, [f"{args.dataset}.jsonl.gz", f"{args.dataset}.jsonl"])
    meta_path = _first_of(args.raw_path, [f"meta_{args.dataset}.jsonl.gz", f"meta_{args.dataset}.jsonl"])
    fields = ("user_id", "parent_asin", "timestamp", "rating")
    _make_ratings(con, JsonLines(path, fields), *fields, time=MILLISECONDS)

    def describe(title: str, description: str, features: str, categories: str, store: str) -> dict[str, str]:
        return {
            "title": _plain(title),
            "description": _plain(description) or _plain(features),
            "categories": _plain(categories, ", "),
            "store": _plain(store),
        }

    fields = ("parent_asin", "title", "description", "features", "categories", "store")
    _make_items(con, JsonLines(meta_path, fields, as_json=True), "parent_asin ->> '$'", fields[1:], describe)
    return _only_titled(con, path, meta_path)


def read_csv(con: DuckDBPyConnection, args: argparse.Namespace) -> bool:
    """Any table with a header: --raw_path is the file of ratings, --items_path that of the items' texts, if any.

    Times are seconds, milliseconds with --time_unit ms, or dates. Ratings of items without a title are left out.
    """
    rating = [args.rating_column] if args.rating_column else []
    raw, columns = _csv(args.raw_path, [args.user_column, args.item_column, args.time_column, *rating])
    _make_ratings(con, raw, *columns, time=MILLISECONDS if args.time_unit == "ms" else SECONDS_OR_DATE)
    if args.items_path is None:
        con.execute("CREATE TABLE items (item VARCHAR, texts VARCHAR)")
        return False

    description = [args.description_column] if args.description_column else []
    raw, (item, *texts) = _csv(args.items_path, [args.item_column, args.title_column, *description])

    def describe(title: str, description: str = "") -> dict[str, str]:
        return {"title": clean_text(title), "description": clean_text(description)}

    _make_items(con, raw, item, texts, describe)
    return _only_titled(con, args.raw_path, args.items_path)


SOURCES = {
    "recbole": read_recbole,
    "movielens": read_movielens,
    "amazon2018": read_amazon2018,
    "amazon2023": read_amazon2023,
    "csv": read_csv,
}


# ---- What they share ----


def _make_ratings(
    con: DuckDBPyConnection,
    raw: JsonLines | Table,
    user: str,
    item: str,
    timestamp: str,
    rating: str | None = None,
    time: str = SECONDS,
    may_lack: bool = False,
) -> None:
    """The table `ratings` from these columns; InputError names the first line that has none of one, or no number.

    `time` makes seconds of a timestamp. A rating that is no number counts as none if it `may_lack`.
    """
    stars = NUMBER.format(rating) if rating else "NULL::DOUBLE"
    columns = f"{user} AS user, {item} AS item, {stars} AS rating, {time.format(timestamp)} AS timestamp"
    load(con, f"CREATE TABLE ratings AS SELECT {columns} FROM {raw.sql}", raw)

    unit, other, remedy, earliest = ("seconds", "milliseconds", "divide", -LATEST)
    if time == MILLISECONDS:
        unit, other, remedy, earliest = ("milliseconds", "seconds", "multiply", LATEST / 1000)
    unrated = "false" if may_lack or rating is None else "NOT coalesce(isfinite(rating), false)"
    faulty = fetch_one(
        con,
        f"""
        SELECT * FROM (
            SELECT rowid, timestamp, CASE
                WHEN coalesce(user, '') = '' THEN 'user'
                WHEN coalesce(item, '') = '' THEN 'item'
                WHEN {unrated} THEN 'numeric rating'
                WHEN NOT coalesce(isfinite(timestamp), false) THEN 'numeric timestamp'
                WHEN timestamp NOT BETWEEN {earliest} AND {LATEST} THEN 'unit'
            END AS fault FROM ratings
        ) WHERE fault IS NOT NULL ORDER BY rowid LIMIT 1""",
    )
    if faulty is not None:
        row, when, fault = faulty
        where = f"{raw.path}: {line_of(raw, row)}"
        if fault != "unit":
            raise InputError(f"{where} has no {fault}; give it one or take the line out")
        when *= 1000 if time == MILLISECONDS else 1
        raise InputError(
            f"{where}: timestamp {when:.0f} is no number of {unit} since 1970; is it in {other}? {remedy} by 1000"
        )
    if fetch_one(con, "SELECT count(*) FROM ratings") == (0,):
        raise InputError(f"{raw.path}: has no ratings")


def _make_items(
    con: DuckDBPyConnection, raw: JsonLines | Table, item: str, columns: list[str], describe: Callable[..., dict]
) -> None:
    """The table `items`: what `describe` makes of the columns, for rated items; an item's first line counts."""

    def texts(values: list[str]) -> str:
        return json.dumps(describe(*values), ensure_ascii=False)

    con.create_function("texts_of", texts, ["VARCHAR[]"], "VARCHAR")
    values = ", ".join(f"coalesce({column}::VARCHAR, '')" for column in columns)
    rows = f"SELECT {item} AS item, [{values}] AS told, row_number() OVER () AS line FROM {raw.sql}"
    rated = "item IN (SELECT DISTINCT item FROM ratings)"
    load(con, f"CREATE TABLE told AS SELECT item, line, texts_of(told) AS texts FROM ({rows}) WHERE {rated}", raw)
    first = "line IN (SELECT min(line) FROM told GROUP BY item)"
    con.execute(f"CREATE TABLE items AS SELECT item, texts FROM told WHERE {first}")
    con.execute("DROP TABLE told")


def _only_titled(con: DuckDBPyConnection, path: Path, items_path: Path) -> bool:
    """Only items that have a title: a language model cannot be told of the others."""
    con.execute("DELETE FROM items WHERE texts ->> '$.title' = ''")
    if fetch_one(con, "SELECT count(*) FROM items") == (0,):
        (rated,) = fetch_one(con, "SELECT count(DISTINCT item) FROM ratings")
        raise InputError(f"{items_path}: has a title for none of the {rated:,} items of {path.name}")
    return True


def _atomic(path: Path, wanted: list[str]) -> tuple[Table, list[str]]:
    """An atomic file, and its columns' names without their types."""
    names = [column.split(":")[0] for column in header_of(path, "\t", quoted=False)["\t"]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: has column {twice!r} twice; keep one")
    if missing := next((name for name in wanted if name not in names), None):
        raise InputError(f"{path}: has no column {missing!r}; it has {', '.join(names)[:300]}")
    return Table(path, len(names), "\t", padded=True), names


def _csv(path: Path, wanted: list[str]) -> tuple[Table, list[str]]:
    """A table whose header has the columns `wanted`, whichever delimiter parts it, and what SQL calls these.

    DuckDB would guess delimiter and quotes, but passes over lines that do not fit its guess.
    """
    headers = header_of(path, ",;\t|", quoted=True)
    delimiter = max(headers, key=lambda one: (sum(name in headers[one] for name in wanted), len(headers[one])))
    names = headers[delimiter]
    if wrong := next((name for name in wanted if names.count(name) != 1), None):
        has = "has more than one column" if wrong in names else "has no column"
        raise InputError(f"{path}: {has} {wrong!r}; it has {', '.join(names)[:300]}; see --help")
    return Table(path, len(names), delimiter, quoted=True), [f"c{names.index(name)}" for name in wanted]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _first_of(folder: Path, names: list[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: has none of {', '.join(names)}; see --raw_path")
    return found


def _plain(value: str, between: str = " ") -> str:
    """A JSON field, a text or a list of texts, as one clean text."""
    content = json.loads(value) if value else ""
    if isinstance(content, list):
        return between.join(filter(None, (clean_text(str(part)) for part in content if part is not None)))
    return clean_text(str("" if content is None else content))


def packaged_example(name: str) -> Path:
    """The folder of example dataset `name` inside the recbole package, which need not be importable for this."""
    try:
        found = [
            file.locate() for file in files("recbole") or [] if file.match(f"dataset_example/{name}/{name}.inter")
        ]
    except PackageNotFoundError:
        raise InputError(
            "the recbole package is not installed: pip install --no-deps -r requirements-assets.txt"
        ) from None
    if not found:
        raise InputError(f"the recbole package has no example dataset {name!r}; name a folder with --raw_path")
    return Path(found[0]).parent
