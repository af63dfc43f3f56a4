"""Health of a ratings dataset: what its parts contain, and their odd rows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data.health import CLEAN, Health, check_owners, check_texts, describe_popularity
from data.values import EARLIEST, LATEST
from reclingua.datasets.ratings import COLUMNS, PARTS, mark_warm, read_items, read_table, row_faults, without_padding
from reclingua.utils.errors import InputError


def check_ratings(folder: Path, name: str) -> Health:
    """Return the health of the ratings dataset in a folder.

    Raises:
        InputError: a file cannot be read, or lacks a column.
    """
    health = Health(f"{name}: ratings dataset in {folder}")
    items = read_items(folder / "item.json")
    tables = {part: usable_rows(folder / f"{part}.parquet", items, health) for part in PARTS}
    frames = {part: table.to_pandas() for part, table in tables.items()}
    rows = pd.concat(frames.values(), keys=frames, names=["part"]).reset_index(level="part")
    num_users, used = rows["uid"].nunique(), rows["iid"].value_counts()
    health.facts += [
        f"users {num_users:,}   items {len(items):,}   ratings {len(rows):,}   "
        f"density {len(rows) / num_users / len(items):.2%}",
        *(describe_part(part, frame) for part, frame in frames.items()),
        describe_popularity(used.to_numpy(), len(items)),
    ]
    check_times(frames, rows, health)
    check_pairs(frames, rows, health)
    check_owners({str(user): int(count) for user, count in rows["uid"].value_counts().items()}, health)
    health.add(len(items) - len(used), "items of item.json without ratings")
    for part, table in mark_warm(tables).items():
        if "not_cold" in tables[part].column_names:
            differs = table["not_cold"].to_numpy() != tables[part]["not_cold"].to_numpy()
            health.add(int(differs.sum()), f"rows of {part} are marked warm or cold against what train contains")
    check_texts(items, health)
    return health


def usable_rows(path: Path, items: dict[str, dict], health: Health | None = None) -> pa.Table:
    """Return the rows of a part that commands accept, without padding; add the others to the findings."""
    table = read_table(path)
    names = [name for name in COLUMNS if name != "not_cold" or name in table.column_names]
    if missing := next((name for name in names if name not in table.column_names), None):
        raise InputError(f"{path}: has no column {missing!r}; it has {', '.join(table.column_names)}")
    health = health or Health("")
    is_bad = np.zeros(len(table), bool)
    for name in names:
        is_null = table[name].is_null().to_numpy()
        health.add(int(is_null.sum()), f"rows of {path.name} have no {name}: commands refuse the dataset; {CLEAN}")
        is_bad |= is_null
    try:
        kept = table.select(names).filter(pa.array(~is_bad))
        columns = {name: kept[name].cast(COLUMNS[name]).combine_chunks() for name in names}
    except pa.ArrowException as error:
        raise InputError(f"{path}: its columns have other types than {COLUMNS} ({error})") from None
    unpadded = without_padding(columns["his"])
    if len(unpadded.flatten()) < len(columns["his"].flatten()):
        health.facts.append(f"{path.name}: histories are padded with zeros, which are ignored")
    columns["his"] = unpadded
    faulty = np.zeros(len(kept), bool)
    for fault, rows in row_faults(columns, np.array([int(item) for item in items])).items():
        first = {name: column[int(rows.argmax())] for name, column in columns.items()} if rows.any() else {}
        text = fault.format(**first) if rows.any() else ""
        health.add(int(rows.sum()), f"rows of {path.name} have {text}: commands refuse the dataset; {CLEAN}")
        faulty |= rows
    usable = pa.table(columns).filter(pa.array(~faulty))
    if not len(usable):
        raise InputError(f"{path}: has no usable row")
    return usable


def describe_part(part: str, frame: pd.DataFrame) -> str:
    """Return the size of a part, its labels, cold rows, and the users that UAUC counts."""
    labels = frame.groupby("uid")["label"].agg(["min", "max"])
    both = int((labels["min"] != labels["max"]).sum())
    cold = f", {1 - frame['not_cold'].mean():.1%} cold" if "not_cold" in frame else ""
    return (
        f"{part:<5} {len(frame):>9,} ratings of {len(labels):,} users, {frame['label'].mean():.1%} liked{cold}; "
        f"{both:,} users have both labels"
    )


def check_times(frames: dict[str, pd.DataFrame], rows: pd.DataFrame, health: Health) -> None:
    """Add ties, implausible times, and parts that overlap in time."""
    tied = rows.duplicated(["uid", "timestamp"], keep=False)
    health.facts.append(f"ties of timestamps: {tied.mean():.1%} of the ratings have the time of another of their user")
    times = rows["timestamp"]
    if times.median() >= EARLIEST:
        odd = int(((times < EARLIEST) | (times >= LATEST)).sum())
        health.add(odd, "ratings have an implausible time, before 1985 or after 2099")
    last = frames["train"]["timestamp"].max()
    early = sum(int((frames[part]["timestamp"] < last).sum()) for part in ("valid", "test"))
    health.add(early, "ratings of valid and test are older than the last one of train: the split is not by time")


def check_pairs(frames: dict[str, pd.DataFrame], rows: pd.DataFrame, health: Health) -> None:
    """Add repeated ratings, and histories that contain the item in question."""
    repeated = rows.duplicated(["uid", "iid"])
    health.facts.append(f"repeated items: {repeated.mean():.1%} of the ratings are of an item rated before")
    for part, frame in frames.items():
        again = int(frame.duplicated(["uid", "iid"]).sum())
        health.add(again, f"rows of {part} repeat a user and an item of another row")
    in_train = rows.loc[rows["part"] == "train", ["uid", "iid"]].drop_duplicates()
    held_out = rows[rows["part"] != "train"].merge(in_train, on=["uid", "iid"])
    health.add(len(held_out), "rows of valid and test have a user and an item that train has: their answer is known")
    known = sum(
        int(sum(item in history for item, history in zip(frame["iid"], frame["his"], strict=True)))
        for frame in frames.values()
    )
    health.add(known, "rows have the item in question in their history: it contains the answer")
