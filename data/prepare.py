"""Turn raw ratings into a dataset folder, for generating the next item or for telling what a user likes.

python -m data.prepare --source recbole --dataset ml-100k
python -m data.prepare --source recbole --dataset mydata --raw_path ~/raw/mydata --min_interactions 5
python -m data.prepare --task preference --source movielens --dataset ml-1m --raw_path ~/raw/ml-1m --start 2001-06-01
python -m data.prepare --task preference --source amazon2018 --dataset Books --raw_path ~/raw/Books \\
    --start 2017-01-01 --months 11 0.5 0.5 --liked_above 4 --min_interactions 21

--task sequential (LC-Rec) writes D.inter.json, D.item.json and the id maps D.user2id, D.item2id. --task preference
(CoLLM, BinLLM, CoRA) writes train.parquet, valid.parquet, test.parquet, item.json and the id maps user2id, item2id.
"""

import argparse
import json
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, files
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from data.dataset import output_folder, whole_file
from data.preference import COLUMNS, PARTS
from data.sources import SOURCES
from errors import InputError, exits_cleanly, one_line


def k_core(interactions: pd.DataFrame, k: int) -> pd.DataFrame:
    """Drop users and items with fewer than `k` interactions until none is left to drop."""
    while True:
        users = interactions.groupby("user")["item"].transform("size")
        items = interactions.groupby("item")["user"].transform("size")
        keep = (users >= k) & (items >= k)
        if keep.all():
            return interactions
        interactions = interactions[keep]


def number(names: pd.Series, first: int = 0) -> dict[str, int]:
    """Raw ids -> `first`, `first` + 1, ... in the order of the raw ids: the same data always gets the same numbers."""
    unique = names.unique()
    key = int if all(name.isdecimal() for name in unique) else str
    return {name: i for i, name in enumerate(sorted(unique, key=key), start=first)}


def time_window(ratings: pd.DataFrame, start: str | None, months: list[float]) -> list[pd.Timestamp]:
    """The four ends of train, valid and test: from `start` on, or the last months of the data; UTC, whole months.

    A part of a month, as in 11 0.5 0.5, is that part of the days of the month it begins in.
    """
    if start is None:
        if any(length % 1 for length in months):
            raise InputError("--months with parts of a month needs --start")
        last = pd.to_datetime(ratings["timestamp"].max(), unit="s").normalize().replace(day=1)
        ends = [last + pd.DateOffset(months=1) - pd.DateOffset(months=-int(-sum(months) // 1))]
    else:
        ends = [pd.Timestamp(start)]
    for length in months:
        whole = ends[-1] + pd.DateOffset(months=int(length))
        ends.append(whole + (length % 1) * (whole + pd.DateOffset(months=1) - whole))
    return ends


def preference_parts(ratings: pd.DataFrame, ends: list[pd.Timestamp], liked_above: float) -> dict[str, pd.DataFrame]:
    """Ratings with numeric ids uid and iid -> train, valid, test with the columns of `data.preference`.

    Rows are sorted by user, then time; among ratings of one second the file's order stays. A rating's history is what
    the user liked before it, whichever part that was in (CoLLM, section 4.1).
    """
    ratings = ratings.sort_values(["uid", "timestamp"])  # by several columns this is stable
    label = (ratings["rating"] > liked_above).astype("int8")
    liked_before = (label.groupby(ratings["uid"]).cumsum() - label).to_numpy()
    liked = ratings[label == 1].groupby("uid")["iid"].agg(list)
    histories = [liked.get(user, [])[:n] for user, n in zip(ratings["uid"], liked_before, strict=True)]
    table = ratings[["uid", "iid", "timestamp"]].assign(label=label, his=histories)
    when = pd.to_datetime(table["timestamp"], unit="s")
    spans = zip(PARTS, pairwise(ends), strict=True)
    parts = {part: table[(when >= begin) & (when < end)] for part, (begin, end) in spans}
    train = parts["train"]
    for part in parts.values():
        part["not_cold"] = (part["uid"].isin(train["uid"]) & part["iid"].isin(train["iid"])).astype("int8")
    return parts


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


def core_of(ratings: pd.DataFrame, items: pd.DataFrame, args: argparse.Namespace, k: int) -> pd.DataFrame:
    """The k-core of the ratings; InputError if it is empty or has an item that is not among `items`."""
    core = k_core(ratings, k)
    if core.empty:
        raise InputError(f"{args.dataset}: the {k}-core is empty; lower --min_interactions")
    if (unknown := ~core["item"].isin(items.index)).any():
        name = core["item"][unknown].iloc[0]
        raise InputError(f"{args.dataset}: item {name!r} has ratings but no line in the item file")
    return core


def id_lines(ids: dict[str, int]) -> str:
    """Which number each raw id got, a line each."""
    return "".join(f"{raw}\t{i}\n" for raw, i in ids.items())


def item_texts(items: pd.DataFrame, numbers: dict[str, int]) -> str:
    """What the raw files tell of each numbered item, as JSON."""
    texts = items.loc[list(numbers)].to_dict("index")
    return json.dumps({str(numbers[raw]): texts[raw] for raw in numbers}, ensure_ascii=False, indent=1) + "\n"


def write_together(folder: Path, content: dict[str, str | pa.Table]) -> None:
    """The files of a dataset belong together: all of them take their places at the end, or none does."""
    with ExitStack() as files:
        for name, content_of in content.items():
            temporary = files.enter_context(whole_file(folder / name))
            if isinstance(content_of, pa.Table):
                pq.write_table(content_of, temporary)
            else:
                temporary.write_text(content_of, encoding="utf-8")


def sequential(ratings: pd.DataFrame, items: pd.DataFrame, args: argparse.Namespace) -> None:
    """Histories in time order, LC-Rec's files."""
    k = args.min_interactions or 5
    core = core_of(ratings, items, args, k)
    users, numbers = number(core["user"]), number(core["item"])
    # A stable sort keeps file order where two ratings carry the same second.
    core = core.sort_values("timestamp", kind="stable")
    histories = core.groupby("user")["item"].agg(list)

    folder, name = output_folder(args.data_path / args.dataset), args.dataset
    inter = {str(users[u]): [str(numbers[i]) for i in histories[u]] for u in users}
    content = {f"{name}.inter.json": json.dumps(inter, ensure_ascii=False) + "\n"}
    content[f"{name}.item.json"] = item_texts(items, numbers)
    write_together(folder, content | {f"{name}.user2id": id_lines(users), f"{name}.item2id": id_lines(numbers)})

    lengths = histories.str.len()
    print(f"{name}: {len(ratings):,} ratings read, {len(core):,} in the {k}-core")
    print(f"  users {len(users):,}   items {len(numbers):,}   density {len(core) / len(users) / len(numbers):.2%}")
    print(f"  interactions a user: min {lengths.min()}, median {lengths.median():.0f}, max {lengths.max()}")
    print(f"  written to {folder}/")


def preference(ratings: pd.DataFrame, items: pd.DataFrame, args: argparse.Namespace) -> None:
    """Likes and dislikes split by time, the files of CoLLM, BinLLM and CoRA; ids start at 1."""
    name = args.dataset
    if (missing := ratings["rating"].isna().to_numpy()).any():
        at = int(missing.argmax()) + 1
        raise InputError(f"{name}: interaction {at:,} of the raw file has no rating to tell a like from a dislike")
    if (odd := ~ratings["timestamp"].between(0, 2**33)).any():
        when = ratings["timestamp"][odd].iloc[0]
        raise InputError(f"{name}: timestamp {when:.0f} is no number of seconds since 1970; is it in milliseconds?")
    ends = time_window(ratings, args.start, args.months)
    first, last = (when.timestamp() for when in (ends[0], ends[-1]))
    window = ratings[(ratings["timestamp"] >= first) & (ratings["timestamp"] < last)]
    if window.empty:
        raise InputError(f"{name}: no ratings {_span(ends[0], ends[-1])}; {_data_has(ratings)}; see --start, --months")
    # Who rates an item again would find the answer in the history: the first rating counts.
    window = window.assign(timestamp=window["timestamp"].astype("int64")).sort_values("timestamp", kind="stable")
    first_ratings = window.drop_duplicates(["user", "item"])
    core = core_of(first_ratings, items, args, args.min_interactions or 1)
    users, numbers = number(core["user"], first=1), number(core["item"], first=1)
    untitled = next((item for item in numbers if not items.loc[item, "title"].strip()), None)
    if untitled is not None:
        raise InputError(f"{name}: item {untitled!r} has no title; give it one or take its ratings out")
    core = core.assign(uid=core["user"].map(users), iid=core["item"].map(numbers))
    parts = preference_parts(core, ends, args.liked_above)
    for (part, rows), (begin, end) in zip(parts.items(), pairwise(ends), strict=True):
        if rows["label"].nunique() < 2:
            what = "no ratings" if rows.empty else f"only ratings {'above' if rows['label'].all() else 'up to'}"
            what += "" if rows.empty else f" {args.liked_above:g}"
            raise InputError(
                f"{name}: {part}, {_span(begin, end)}, has {what}; {_data_has(ratings)}; "
                "see --start, --months, --liked_above"
            )

    folder = output_folder(args.data_path / name)
    content = {
        f"{part}.parquet": pa.table({column: pa.array(rows[column], kind) for column, kind in COLUMNS.items()})
        for part, rows in parts.items()
    }
    content["item.json"] = item_texts(items, numbers)
    write_together(folder, content | {"user2id": id_lines(users), "item2id": id_lines(numbers)})

    print(f"{name}: {len(ratings):,} ratings read, {len(core):,} kept; users {len(users):,}, items {len(numbers):,}")
    if again := len(window) - len(first_ratings):
        print(f"  left out: {again:,} ratings of what the user had rated before")
    for (part, rows), (begin, end) in zip(parts.items(), pairwise(ends), strict=True):
        print(
            f"  {part:<5} {_span(begin, end)}: {len(rows):>9,} ratings, {rows['label'].mean():.1%} liked, "
            f"{1 - rows['not_cold'].mean():.1%} cold"
        )
    print(f"  written to {folder}/")


def _span(begin: pd.Timestamp, end: pd.Timestamp) -> str:
    return f"{begin:%Y-%m-%d} to {end - pd.Timedelta(seconds=1):%Y-%m-%d}"


def _data_has(ratings: pd.DataFrame) -> str:
    first, last = (pd.to_datetime(ratings["timestamp"].agg(which), unit="s") for which in ("min", "max"))
    return f"the data has {_span(first, last)}"


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=("sequential", "preference"), default="sequential",
        help="histories to generate the next item from, or likes and dislikes split by time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--source", choices=sorted(SOURCES), default="recbole", help="format of the raw files")
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--raw_path", type=Path, help="folder of the raw files (default: the recbole package's example)"
    )
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="where <dataset>/ goes (default: %(default)s)"
    )
    parser.add_argument(
        "--min_interactions", type=int,
        help="k of the k-core over users and items, with --task preference within the window "
        "(default: 5, with --task preference 1)",
    )  # fmt: skip
    of_preference = parser.add_argument_group("--task preference")
    of_preference.add_argument("--start", help="first day of train, like 2001-06-01 (default: the last months count)")
    of_preference.add_argument(
        "--months", type=float, nargs=3, default=[10, 5, 5], metavar=("TRAIN", "VALID", "TEST"),
        help="months of each part; .5 is half the days of one (default: 10 5 5, the papers' for MovieLens-1M)",
    )  # fmt: skip
    of_preference.add_argument(
        "--liked_above", type=float, default=3, help="ratings above this count as liked (default: %(default)s)"
    )
    args = one_line(parser).parse_args()
    if args.min_interactions is not None and args.min_interactions < 1:
        raise InputError(f"--min_interactions {args.min_interactions}: should be 1 at least")
    if not all(0 < months <= 240 for months in args.months):
        raise InputError(f"--months {' '.join(f'{months:g}' for months in args.months)}: should be above 0, up to 240")
    if args.start is not None and args.task != "preference":
        raise InputError("--start is for --task preference")
    day = pd.to_datetime(args.start, format="%Y-%m-%d", errors="coerce") if args.start else pd.Timestamp(0)
    if pd.isna(day) or day.year > 2200:
        raise InputError(f"--start {args.start}: should be a day, like 2001-06-01")

    ratings, items = SOURCES[args.source](args.raw_path or packaged_example(args.dataset), args.dataset)
    (preference if args.task == "preference" else sequential)(ratings, items, args)


if __name__ == "__main__":
    main()
