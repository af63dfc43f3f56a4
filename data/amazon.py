"""Readers of the Amazon reviews of 2014, 2018 and 2023: JSON lines, or ratings alone as a table."""

import json
from collections.abc import Callable
from pathlib import Path

from data.cleaning import clean_value
from data.columns import ratings_columns, read_header
from data.ingestion import Ingestion
from data.raw_files import JsonLines, Table, first_file, identifier

REVIEW_FIELDS = ("reviewerID", "asin", "unixReviewTime", "overall")  # of 2014 and 2018


def read_amazon2014(ingestion: Ingestion) -> None:
    """Read Amazon reviews of 2014: `reviews_D_5.json(.gz)` or `reviews_D.json(.gz)`, and `meta_D.json(.gz)`.

    The metadata are Python dictionaries. Without reviews, `ratings_D.csv` is read, which has no header.
    """
    name = ingestion.args.dataset
    reviews = [f"reviews_{name}{kind}.json{end}" for kind in ("_5", "") for end in (".gz", "")]
    path = first_file(ingestion.args.raw_path, [*reviews, f"ratings_{name}.csv"])
    _read_reviews(ingestion, path, ("c0", "c1", "c3", "c2"))
    _read_metadata(ingestion)


def read_amazon2018(ingestion: Ingestion) -> None:
    """Read Amazon reviews of 2018: `D.json(.gz)` or `D_5.json(.gz)`, and `meta_D.json(.gz)`.

    Without reviews, `D.csv` is read, which has no header.
    """
    name = ingestion.args.dataset
    reviews = [f"{name}{kind}.json{end}" for kind in ("", "_5") for end in (".gz", "")]
    path = first_file(ingestion.args.raw_path, [*reviews, f"{name}.csv"])
    _read_reviews(ingestion, path, ("c1", "c0", "c3", "c2"))
    _read_metadata(ingestion)


def read_amazon2023(ingestion: Ingestion) -> None:
    """Read Amazon reviews of 2023: `D.jsonl(.gz)` or `D.csv(.gz)`, times in milliseconds, and `meta_D.jsonl(.gz)`.

    Items are parent products. Item texts are title, description (or else the features), categories and store.
    """
    args, name = ingestion.args, ingestion.args.dataset
    path = first_file(args.raw_path, [f"{name}.{kind}{end}" for kind in ("jsonl", "csv") for end in (".gz", "")])
    meta_path = first_file(args.raw_path, [f"meta_{name}.jsonl.gz", f"meta_{name}.jsonl"])
    if ".csv" in path.suffixes:
        raw, columns = read_header(path, args, ("user", "item", "time", "rating"))
        ingestion.create_ratings(raw, *ratings_columns(columns, rating_required=True), unit="ms")
    else:
        _read_json_reviews(ingestion, path, ("user_id", "parent_asin", "timestamp", "rating"), "ms")

    def describe(title: str, description: str, features: str, categories: str, store: str) -> dict[str, str]:
        return {
            "title": clean_json(title),
            "description": clean_json(description) or clean_json(features),
            "categories": clean_json(categories, ", "),
            "store": clean_json(store),
        }

    texts = (args.title_column or "title", args.description_column or "description", "features")
    texts += (args.categories_column or "categories", args.brand_column or "store")
    _read_json_items(ingestion, meta_path, "parent_asin", texts, describe)


def _read_reviews(ingestion: Ingestion, path: Path, columns: tuple[str, ...]) -> None:
    """Create the ratings; `columns` are user, item, time and rating of a table without a header."""
    if path.suffix == ".csv":
        raw = Table(path, 4, ",", quoted=True, header=False, encoding=ingestion.args.encoding)
        ingestion.create_ratings(raw, *columns)
    else:
        _read_json_reviews(ingestion, path, REVIEW_FIELDS, "s")


def _read_metadata(ingestion: Ingestion) -> None:
    args = ingestion.args
    path = first_file(args.raw_path, [f"meta_{args.dataset}.json.gz", f"meta_{args.dataset}.json"])

    def describe(title: str, description: str, brand: str, categories: str, category: str) -> dict[str, str]:
        title = clean_json(title)
        return {
            # For some pages the crawler saved a script instead of the title.
            "title": "" if "getTime()" in title else title,
            "description": clean_json(description),
            "brand": clean_json(brand),
            "categories": clean_json(categories, ", ") or clean_json(category, ", "),  # of 2014, of 2018
        }

    texts = (args.title_column or "title", args.description_column or "description", args.brand_column or "brand")
    _read_json_items(ingestion, path, "asin", (*texts, args.categories_column or "categories", "category"), describe)


def _read_json_reviews(ingestion: Ingestion, path: Path, defaults: tuple[str, ...], unit: str) -> None:
    """Create the ratings from the fields of user, item, time and rating, by flags or else `defaults`."""
    args = ingestion.args
    flags = (args.user_column, args.item_column, args.time_column, args.rating_column)
    user, item, time, rating = (flag or default for flag, default in zip(flags, defaults, strict=True))
    fields = (user, item, rating) if time == "none" else (user, item, rating, time)
    raw = JsonLines(path, tuple(dict.fromkeys(fields)), encoding=args.encoding)
    ingestion.create_ratings(
        raw, identifier(user), identifier(item), None if time == "none" else identifier(time), identifier(rating), unit
    )


def _read_json_items(
    ingestion: Ingestion, path: Path, key: str, texts: tuple[str, ...], describe: Callable[..., dict]
) -> None:
    """Create the items from the fields `texts`, which `describe` takes as JSON."""
    args = ingestion.args
    key = args.items_id_column or args.item_column or key
    raw = JsonLines(path, tuple(dict.fromkeys((key, *texts))), as_json=True, encoding=args.encoding)
    ingestion.create_items(raw, f"{identifier(key)} ->> '$'", list(map(identifier, texts)), describe)


def clean_json(value: str, separator: str = " ") -> str:
    """Return a JSON field, a text or a list of texts, as one clean text."""
    return clean_value(json.loads(value) if value else "", separator)
