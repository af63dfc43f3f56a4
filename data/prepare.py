"""Turn raw ratings into a dataset folder: D.inter.json, D.item.json and the id maps D.user2id, D.item2id.

python -m data.prepare --source recbole --dataset ml-100k
python -m data.prepare --source recbole --dataset mydata --raw_path ~/raw/mydata --min_interactions 5
"""

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pandas as pd

from data.dataset import output_folder, whole_file, write_json
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


def number(names: pd.Series) -> dict[str, str]:
    """Raw ids -> "0", "1", ... in the order of the raw ids, so that the same data always gets the same numbers."""
    unique = names.unique()
    key = int if all(name.isdecimal() for name in unique) else str
    return {name: str(i) for i, name in enumerate(sorted(unique, key=key))}


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


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=sorted(SOURCES), default="recbole", help="format of the raw files")
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--raw_path", type=Path, help="folder of the raw files (default: the recbole package's example)"
    )
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="where <dataset>/ goes (default: %(default)s)"
    )
    parser.add_argument(
        "--min_interactions", type=int, default=5, help="k of the k-core over users and items (default: %(default)s)"
    )
    args = one_line(parser).parse_args()

    # Read, filter, order.
    raw, item_table = SOURCES[args.source](args.raw_path or packaged_example(args.dataset), args.dataset)
    interactions = k_core(raw, args.min_interactions)
    if interactions.empty:
        raise InputError(f"{args.dataset}: the {args.min_interactions}-core is empty; lower --min_interactions")
    users, items = number(interactions["user"]), number(interactions["item"])
    # A stable sort keeps file order where two ratings carry the same second.
    interactions = interactions.sort_values("timestamp", kind="stable")
    histories = interactions.groupby("user")["item"].agg(list)

    # Write.
    unknown = next((item for item in items if item not in item_table.index), None)
    if unknown is not None:
        raise InputError(f"{args.dataset}: item {unknown!r} has ratings but no line in the item file")
    folder = output_folder(args.data_path / args.dataset)
    texts = item_table.loc[list(items)].to_dict("index")
    write_json(folder / f"{args.dataset}.inter.json", {users[u]: [items[i] for i in histories[u]] for u in users})
    write_json(folder / f"{args.dataset}.item.json", {items[raw]: texts[raw] for raw in items}, indent=1)
    for kind, ids in (("user", users), ("item", items)):
        with whole_file(folder / f"{args.dataset}.{kind}2id") as temporary:
            temporary.write_text("".join(f"{raw}\t{i}\n" for raw, i in ids.items()), encoding="utf-8")

    lengths = histories.str.len()
    print(f"{args.dataset}: {len(raw):,} ratings read, {len(interactions):,} in the {args.min_interactions}-core")
    print(f"  users {len(users):,}   items {len(items):,}   density {len(interactions) / len(users) / len(items):.2%}")
    print(f"  interactions a user: min {lengths.min()}, median {lengths.median():.0f}, max {lengths.max()}")
    print(f"  written to {folder}/")


if __name__ == "__main__":
    main()
