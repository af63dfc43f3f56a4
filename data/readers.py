"""Readers of published ratings: raw files -> the tables `ratings` and `items` of an `Ingestion`.

ratings: user, item (VARCHAR), rating (DOUBLE, NULL if missing), timestamp (DOUBLE, seconds); rowid is the order of
    the file;
items: item (VARCHAR) and texts (a JSON object: title, description, other texts), rated items only.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from data.amazon import read_amazon2014, read_amazon2018, read_amazon2023
from data.cleaning import clean_text, clean_value, movie_description, natural_title
from data.columns import FLAGS, Columns, ratings_columns, read_atomic_header, read_header
from data.ingestion import Ingestion
from data.raw_files import Table, first_file, require_file
from reclingua.utils.errors import InputError


def read_recbole(ingestion: Ingestion) -> None:
    """Read RecBole atomic files `D.inter` and `D.item`: tab separated, `column:type` headers, no quotes."""
    args = ingestion.args
    folder = args.raw_path or packaged_example(args.dataset)
    raw, columns = read_atomic_header(folder / f"{args.dataset}.inter", args)
    needs_rating = args.task == "preference"
    item_name = columns.names[columns.require("item")]
    ingestion.create_ratings(raw, *ratings_columns(columns, needs_rating), rating_required=needs_rating)
    if not (folder / f"{args.dataset}.item").exists():
        ingestion.create_no_items()
        ingestion.remarks.append(f"there is no {args.dataset}.item: the dataset has no texts")
        return

    raw, columns = read_atomic_header(folder / f"{args.dataset}.item", args)
    names, key = columns.names, columns.find("items_id", [args.item_column, item_name])
    key = columns.require("item") if key is None else key
    titles = [names[column] for column in _title_columns(columns)]

    def describe(*values: str) -> dict[str, str]:
        record = {name: clean_value(value) for name, value in zip(names, values, strict=True)}
        title = next(filter(record.get, titles), titles[0] if titles else None)
        own_title = record.pop(title) if title else ""
        description = None if own_description is None else record.pop(names[own_description])
        if description is None:
            description = movie_description(record.get("release_year", ""), record.get("class", "").split())
        texts = {"title": natural_title(own_title), "description": description}
        return texts | {name: text for name, text in record.items() if name not in (*texts, names[key])}

    own_description = columns.find("description")
    ingestion.create_items(raw, f"c{key}", [f"c{i}" for i in range(len(names))], describe)


def _title_columns(columns: Columns) -> list[int]:
    """Return the columns of titles: by flag or usual names, else the first whose name ends in title or name."""
    endings = [i for ending in ("title", "name") for i, name in enumerate(columns.names) if name.endswith(ending)]
    return columns.find_all("title") or endings[:1]


def read_movielens(ingestion: Ingestion) -> None:
    """Read MovieLens: `ratings.dat`, `movies.dat` (1M, 10M), or `ratings.csv`, `movies.csv` (20M, 25M, 32M)."""
    args = ingestion.args
    path = first_file(args.raw_path, ["ratings.dat", "ratings.csv"])
    movies_path = require_file(path.with_name(path.name.replace("ratings", "movies")))
    if path.suffix == ".dat":
        if flag := next((FLAGS[kind] for kind in FLAGS if getattr(args, f"{kind}_column") is not None), None):
            raise InputError(f"{path}: has no header, so that {flag} has no effect; leave it out")
        ingestion.create_ratings(Table(path, 4, "::", header=False, encoding=args.encoding), "c0", "c1", "c3", "c2")
        encoding = args.encoding if args.encoding != "utf-8" or _is_utf8(movies_path) else "latin-1"  # 10M, and 1M
        movies, item, *texts = Table(movies_path, 3, "::", header=False, encoding=encoding), "c0", "c1", "c2"
    else:
        raw, columns = read_header(path, args, ("user", "item", "time", "rating"))
        ingestion.create_ratings(raw, *ratings_columns(columns, rating_required=True))
        movies, columns = read_header(movies_path, args, ("item", "title", "categories"))
        item, *texts = (f"c{columns.require(kind)}" for kind in ("item", "title", "categories"))

    def describe(title: str, genres: str) -> dict[str, str]:
        genres = "" if genres == "(no genres listed)" else clean_text(genres).replace("|", " ")
        return {
            "title": natural_title(clean_text(title)),
            "description": movie_description("", genres.split()),
            "class": genres,
        }

    ingestion.create_items(movies, item, texts, describe)


def read_csv(ingestion: Ingestion) -> None:
    """Read tables with a header: ratings from --raw_path, item texts from --items_path, if any."""
    args = ingestion.args
    needs_rating = args.task == "preference"
    raw, columns = read_header(args.raw_path, args, ("user", "item", "time", "rating"))
    item_name = columns.names[columns.require("item")]
    user, item, time, rating = ratings_columns(columns, needs_rating)
    is_used = needs_rating or args.rating_column is not None
    ingestion.create_ratings(raw, user, item, time, rating, rating_required=is_used)
    if args.items_path is None:
        ingestion.create_no_items()
        return

    kinds = ("title", "description", "brand", "categories")
    raw, columns = read_header(args.items_path, args, ("items_id", "item", *kinds))
    key = columns.find("items_id", [args.item_column, item_name])
    key = columns.require("item") if key is None else key
    texts: dict[str, int] = {}
    for kind in kinds:
        column = columns.find(kind)
        if column is not None and column not in (key, *texts.values()):
            texts[kind] = column
    other_titles = [column for column in columns.find_all("title") if column not in (key, *texts.values())]

    def describe(*values: str) -> dict[str, str]:
        separators = {"categories": ", "}
        record = {
            kind: clean_value(value, separators.get(kind, " ")) for kind, value in zip(texts, values, strict=False)
        }
        titles = [record.get("title", ""), *map(clean_value, values[len(texts) :])]
        return {"title": "", "description": ""} | record | {"title": next(filter(None, titles), "")}

    ingestion.create_items(raw, f"c{key}", [f"c{column}" for column in (*texts.values(), *other_titles)], describe)


SOURCES = {
    "recbole": read_recbole,
    "movielens": read_movielens,
    "amazon2014": read_amazon2014,
    "amazon2018": read_amazon2018,
    "amazon2023": read_amazon2023,
    "csv": read_csv,
}


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


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
