"""Raw data in the formats it is published in -> one table of interactions and one of items."""

from pathlib import Path

import pandas as pd

from errors import InputError


def read_recbole(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """RecBole atomic files `name.inter` and `name.item` (tab separated, `column:type` headers).

    Returns:
        interactions: columns user, item (str), timestamp (float), in file order.
        items: index item (str), columns title, description and the rest of what the file tells, all str.
    """
    interactions = _read_atomic(folder / f"{name}.inter", ["user_id", "item_id", "timestamp"])
    interactions = interactions.rename(columns={"user_id": "user", "item_id": "item"})
    seconds = pd.to_numeric(interactions["timestamp"], errors="coerce")
    if seconds.isna().any():
        line = int(seconds.isna().to_numpy().argmax()) + 2
        raise InputError(f"{folder / f'{name}.inter'}: line {line} has no numeric timestamp")
    interactions["timestamp"] = seconds

    items = _read_atomic(folder / f"{name}.item", ["item_id"]).drop_duplicates("item_id").set_index("item_id")
    titles = [column for column in items.columns if column.endswith("title")]
    if not titles:
        raise InputError(f"{folder / f'{name}.item'}: has no column whose name ends in 'title'")
    items = items.rename(columns={titles[0]: "title"})
    items["title"] = [_natural_title(title) for title in items["title"]]
    if "description" not in items:
        items.insert(1, "description", [_movie_description(item) for item in items.to_dict("records")])
    return interactions[["user", "item", "timestamp"]], items


def _read_atomic(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=3, index_col=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name the folder of the atomic files with --raw_path") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not a RecBole atomic file ({error})") from None
    table.columns = [column.split(":")[0] for column in table.columns]
    if missing := [column for column in columns if column not in table.columns]:
        raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table


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


SOURCES = {"recbole": read_recbole}
