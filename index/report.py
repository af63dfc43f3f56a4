"""Compare index files: collisions, codebook use, and shared prefixes within a category.

python -m index.report data/ml-100k/ml-100k.index.json --item data/ml-100k/ml-100k.item.json
python -m index.report rqvae.index.json kmeans.index.json --item data/D/D.item.json --output results/D/index

Index files can have collisions. The script prints a table and writes it as report.json, with a plot, report.png.
Categories: of all pairs of items that share a category, the share that also has the first 1, 2, ... codes of the
semantic ID in common; the lift is this share over that of all pairs, about 1 for random codes. A pair with two
categories in common counts twice; a category of more than half of the items is uninformative and left out.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reclingua.datasets.interactions import read_codes, read_items
from reclingua.metrics.index import index_statistics
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_folder, write_json
from reclingua.utils.metadata import run_metadata
from reclingua.utils.text import unique_names

# Keys of item texts with categories, in order of preference, and their separator (None: one category).
CATEGORY_KEYS = {"categories": ",", "class": " ", "brand": None}


def read_categories(path: Path, key: str | None) -> tuple[str | None, dict[str, set[str]]]:
    """Read the categories of the items.

    A list has one category per element; a text is one category, except `categories` (separated by commas) and
    `class` (by spaces).

    Args:
        key: key of the categories; None: the first of CATEGORY_KEYS with informative values.

    Returns:
        (the key, None if no category is informative, item -> its categories; without those of one item or of more
        than half of the items).

    Raises:
        InputError: the file is no item file, or no item has the key.
    """
    items = read_items(path)
    if key and not any(key in record for record in items.values()):
        raise InputError(f"{path}: no item has the key {key!r}; see --category_key")
    for name in [key] if key else CATEGORY_KEYS:
        categories = {item: _split(record.get(name), CATEGORY_KEYS.get(name)) for item, record in items.items()}
        members = Counter(category for names in categories.values() for category in names)
        informative = {category for category, count in members.items() if 2 <= count <= len(items) / 2}
        if informative:
            return name, {item: names & informative for item, names in categories.items()}
    return None, {item: set() for item in items}


def _split(value: object, separator: str | None) -> set[str]:
    if not isinstance(value, list):
        text = "" if value is None else str(value)
        value = text.split(separator) if separator else [text]
    return {category for part in value if (category := str(part).strip())}


def format_table(statistics: dict[str, dict]) -> str:
    """Format a table: one row per statistic, one column per index file (name -> `index_statistics`)."""
    lines: list[tuple[str, list[str]]] = []

    def add_line(label: str, render: Callable[[dict], str], part: str = "", level: int = 0) -> None:
        """Add a row; a cell is empty where an index has fewer levels."""
        columns = [index[part][level : level + 1] if part else [index] for index in statistics.values()]
        lines.append((label, [render(values[0]) if values else "" for values in columns]))

    add_line("items", lambda index: f"{index['items']:,}")
    add_line("colliding items", lambda index: f"{index['colliding_items']:,}")
    depth = max(len(index["levels"]) for index in statistics.values())
    for level in range(depth):
        add_line(f"level {level + 1}: codes used", lambda codes: f"{codes['codes_used']:,}", "levels", level)
        add_line("  perplexity", lambda codes: f"{codes['perplexity']:.1f}", "levels", level)
    for level in range(depth):
        label = f"first {level + 1} codes" if level else "first code"
        add_line(f"{label}: groups", lambda prefix: f"{prefix['groups']:,}", "prefixes", level)
        add_line("  largest group", lambda prefix: f"{prefix['largest'][0]['items']:,}", "prefixes", level)
        prefixes = [prefix for index in statistics.values() for prefix in index["prefixes"][level : level + 1]]
        if all(prefix["share_of_all_pairs"] == 0 for prefix in prefixes):
            continue  # no two items share the prefix
        add_line("  shared by all pairs", lambda prefix: f"{prefix['share_of_all_pairs']:.3%}", "prefixes", level)
        if "lift" in next(iter(statistics.values()))["prefixes"][0]:
            add_line(
                "  by pairs of a category",
                lambda prefix: f"{prefix['share_of_category_pairs']:.3%}",
                "prefixes",
                level,
            )
            add_line(
                "  lift", lambda prefix: "" if prefix["lift"] is None else f"{prefix['lift']:.2f}", "prefixes", level
            )
    rows = [("", list(statistics)), *lines]
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    return "\n".join(
        f"{label:<26}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in rows
    )


def plot(statistics: dict[str, dict], key: str | None, path: Path) -> None:
    """Plot perplexity and codes used of each level; with categories (of `key`) also the lift, as a PNG."""
    from matplotlib.figure import Figure  # imported here: takes a second, and --help should not

    depth = max(len(index["levels"]) for index in statistics.values())
    figure = Figure(figsize=(13 if key else 7, 5), layout="constrained")
    left, *right = np.atleast_1d(figure.subplots(1, 2 if key else 1))
    width = 0.8 / len(statistics)
    for column, (name, index) in enumerate(statistics.items()):
        levels, color = index["levels"], f"C{column}"
        x = np.arange(1, len(levels) + 1) + (column - (len(statistics) - 1) / 2) * width
        left.bar(x, [level["perplexity"] for level in levels], width * 0.9, color=color, label=name)
        left.bar(x, [level["codes_used"] for level in levels], width * 0.9, fill=False, edgecolor=color)
        for axes in right:
            # A lift of 0 or None has no logarithm.
            lifts = {prefix["length"]: prefix["lift"] for prefix in index["prefixes"] if prefix["lift"]}
            axes.plot(list(lifts), list(lifts.values()), marker="o", color=color)
    left.set(title="Perplexity (filled) and codes used (frame)", xlabel="level", ylabel="codes")
    for axes in right:
        axes.axhline(1, color="grey", linewidth=1, linestyle=":")
        axes.set(title=f"Shared first codes within one {key}", xlabel="number of first codes", yscale="log")
        axes.set_ylabel("lift over all pairs")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
    for axes in (left, *right):
        axes.set_xticks(range(1, depth + 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png", dpi=120)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+", help="index files, D.index.json")
    parser.add_argument("--item", type=Path, help="D.item.json with categories of the items")
    parser.add_argument(
        "--category_key", help=f"key of the categories (default: the first filled of {', '.join(CATEGORY_KEYS)})"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/index"), help="output folder (default: %(default)s)"
    )
    args = one_line_errors(parser).parse_args()
    if args.category_key and not args.item:
        raise InputError("--category_key needs --item, the file with the key")
    if len(set(args.index)) < len(args.index):
        raise InputError("an index file is given twice; name it once")
    started = time.monotonic()

    indices = dict(zip(unique_names(args.index), map(read_codes, args.index), strict=True))
    key, categories = read_categories(args.item, args.category_key) if args.item else (None, None)
    for path, index in zip(args.index, indices.values(), strict=True) if args.item else ():
        if (extra := next((item for item in index if item not in categories), None)) is not None:
            raise InputError(f"{path}: item {extra!r} is not in {args.item}; give files of the same dataset")
        if (missing := next((item for item in categories if item not in index), None)) is not None:
            raise InputError(
                f"{path}: item {missing!r} of {args.item} has no semantic ID; give files of the same dataset"
            )

    statistics = {name: index_statistics(index, categories if key else None) for name, index in indices.items()}
    print(format_table(statistics))
    if args.item and key is None:
        searched = args.category_key or ", ".join(CATEGORY_KEYS)
        print(f"no lifts: no category in {searched} of {args.item} is shared by two or more items, up to half of them")
    output_folder(args.output)
    with atomic_write(args.output / "report.png") as temporary:
        plot(statistics, key, temporary)
    metadata = run_metadata(vars(args) | {"index": list(map(str, args.index))}, started)
    write_json(args.output / "report.json", {"category_key": key, "indices": statistics, **metadata}, indent=1)
    print(f"{'categories: ' + key + '; ' if key else ''}-> {args.output}/report.json, report.png")


if __name__ == "__main__":
    main()
