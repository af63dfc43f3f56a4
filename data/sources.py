"""Raw data in the formats it is published in -> one table of ratings and one of items.

Every reader takes the folder of the raw files and the dataset's name and returns
    ratings: columns user, item (str), rating (float, NaN where there is none), timestamp (float, seconds), in file
        order;
    items: index item (str), columns title, description and the rest of what the files tell, all str.
"""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from errors import InputError

Tables = tuple[pd.DataFrame, pd.DataFrame]


def read_recbole(folder: Path, name: str) -> Tables:
    """RecBole atomic files `name.inter` and `name.item` (tab separated, `column:type` headers)."""
    path = folder / f"{name}.inter"
    table = _read_atomic(path, ["user_id", "item_id", "timestamp"], skip_blank_lines=False)
    ratings = table.rename(columns={"user_id": "user", "item_id": "item"})
    ratings["timestamp"] = _numbers(ratings["timestamp"], path, 2)
    ratings["rating"] = pd.to_numeric(ratings["rating"], errors="coerce") if "rating" in ratings else float("nan")

    items = _read_atomic(folder / f"{name}.item", ["item_id"]).drop_duplicates("item_id").set_index("item_id")
    titles = [column for column in items.columns if column.endswith("title")]
    if not titles:
        raise InputError(f"{folder / f'{name}.item'}: has no column whose name ends in 'title'")
    items = items.rename(columns={titles[0]: "title"})
    items["title"] = [_natural_title(title) for title in items["title"]]
    if "description" not in items:
        items.insert(1, "description", [_movie_description(item) for item in items.to_dict("records")])
    return ratings[["user", "item", "rating", "timestamp"]], items


def read_movielens(folder: Path, name: str) -> Tables:
    """MovieLens-1M's `ratings.dat` and `movies.dat` (fields between `::`, Latin-1)."""
    path = folder / "ratings.dat"
    ratings = _read_double_colons(path, ["user", "item", "rating", "timestamp"])
    for column in ("rating", "timestamp"):
        ratings[column] = _numbers(ratings[column], path, 1)
    items = _read_double_colons(folder / "movies.dat", ["item", "title", "class"])
    items = items.drop_duplicates("item").set_index("item")
    items["class"] = items["class"].str.replace("|", " ")
    stems = items["title"].str.extract(r"^(.*?)( \(\d{4}\))?\s*$").fillna("")  # the year stands behind the title
    items["title"] = [_natural_title(title) + year for title, year in zip(stems[0], stems[1], strict=True)]
    items.insert(1, "description", [_movie_description(item) for item in items.to_dict("records")])
    return ratings, items


def read_amazon2018(folder: Path, name: str) -> Tables:
    """Amazon reviews of 2018, JSON lines: `name.json(.gz)` or `name_5.json(.gz)`, and `meta_name.json(.gz)`."""
    path = _first_of(folder, [f"{name}.json.gz", f"{name}.json", f"{name}_5.json.gz", f"{name}_5.json"])
    fields = ("reviewerID", "asin", "overall", "unixReviewTime")
    rows = [[record.get(field) for field in fields] for record in _read_lines(path)]
    ratings = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"])
    for column in ("user", "item"):
        if ratings[column].isna().any():
            raise InputError(f"{path}: line {int(ratings[column].isna().argmax()) + 1} has no {column}")
    for column in ("rating", "timestamp"):
        ratings[column] = _numbers(ratings[column], path, 1)
    ratings = ratings.astype({"user": str, "item": str})

    wanted, texts = set(ratings["item"]), {}
    meta_path = _first_of(folder, [f"meta_{name}.json.gz", f"meta_{name}.json"])
    for record in _read_lines(meta_path):
        item, description = str(record.get("asin")), record.get("description") or ""
        if item in wanted and item not in texts:
            description = " ".join(map(str, description)) if isinstance(description, list) else str(description)
            texts[item] = {"title": str(record.get("title") or "").strip(), "description": description.strip()}
    items = pd.DataFrame.from_dict(texts, orient="index", columns=["title", "description"])
    # Reviews of what the metadata has no title for cannot be told to a language model.
    titled = ratings["item"].isin(items.index[items["title"] != ""])
    if not titled.any():
        raise InputError(
            f"{meta_path}: has a title for none of the {ratings['item'].nunique():,} items of {path.name}"
        )
    if not titled.all():
        print(f"{path.name}: {(~titled).sum():,} ratings of items without a title in {meta_path.name} are left out")
    return ratings[titled], items


def _numbers(values: pd.Series, path: Path, first_line: int) -> pd.Series:
    """The column as float; InputError names the line of what is no number. The rows begin at line `first_line`."""
    try:
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{path}: a {values.name} is no number that fits") from None
    wrong = ~np.isfinite(numbers.to_numpy())
    if wrong.any():
        line = int(wrong.argmax()) + first_line
        raise InputError(f"{path}: line {line} has no numeric {values.name}")
    return numbers


def _read_atomic(path: Path, columns: list[str], **options) -> pd.DataFrame:
    table = _read_table(path, path, "a RecBole atomic file", **options)
    table.columns = [column.split(":")[0] for column in table.columns]
    if not table.columns.is_unique:
        raise InputError(f"{path}: has column {table.columns[table.columns.duplicated()][0]!r} twice; keep one")
    if missing := [column for column in columns if column not in table.columns]:
        raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table


def _read_double_colons(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --raw_path") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count("::") != len(columns) - 1:
            raise InputError(f"{path}: line {number} does not have the {len(columns)} fields {'::'.join(columns)}")
    return _read_table(io.StringIO(text.replace("::", "\t")), path, "a MovieLens file", names=columns, header=None)


def _read_table(source: Path | io.StringIO, path: Path, what: str, **options) -> pd.DataFrame:
    """A tab separated table, every cell a str."""
    try:
        table = pd.read_csv(source, sep="\t", dtype=str, keep_default_na=False, quoting=3, index_col=False, **options)
        return table.fillna("")  # short lines
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name the folder of the raw files with --raw_path") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not {what} ({error})") from None


def _first_of(folder: Path, names: list[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: has none of {', '.join(names)}; see --raw_path")
    return found


def _read_lines(path: Path) -> Iterator[dict]:
    """The JSON objects of a file, one a line, gzipped or not."""
    line = 1
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for text in file:
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object")
                yield record
                line += 1
    except (OSError, EOFError, ValueError, RecursionError) as error:  # those of gzip and JSON among them
        raise InputError(
            f"{path}: line {line} cannot be read ({error}); repair the file or take the line out"
        ) from None


def _natural_title(title: str) -> str:
    """Catalogues sort by the noun: 'Godfather, The' reads 'The Godfather'."""
    stem, comma, article = title.strip().rpartition(", ")
    return (
        f"{article} {stem}"
        if comma and article in {"The", "A", "An", "La", "Le", "Les", "Il", "Das"}
        else title.strip()
    )


def _movie_description(item: dict[str, str]) -> str:
    """The columns that MovieLens has beside the title, as a sentence."""
    year, kinds = item.get("release_year", "").strip(), item.get("class", "").split()
    parts = [f"Released in {year}" if year else "", f"Genres: {', '.join(kinds)}" if kinds else ""]
    return ". ".join(part for part in parts if part)


SOURCES = {"recbole": read_recbole, "movielens": read_movielens, "amazon2018": read_amazon2018}
