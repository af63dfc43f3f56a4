"""Compare index files: collisions, use of the codes, and whether items of one category begin alike.

python -m index.report data/ml-100k/ml-100k.index.json --item data/ml-100k/ml-100k.item.json
python -m index.report rqvae.index.json kmeans.index.json --item data/D/D.item.json --output results/D/index

Index files need not be free of collisions. The table on the screen, report.json and report.png go together. What it
says of categories: of all pairs of items that share a category, how many share the first 1, 2, ... codes as well, and
how many times the share among all pairs that is. A pair with two categories in common counts twice; a category of more
than half of the items is left out, since it tells nothing. An index drawn at random has about 1.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from reclingua.datasets.interactions import read_codes
from reclingua.metrics.index import index_statistics
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_folder, read_json, write_json
from reclingua.utils.metadata import run_metadata
from reclingua.utils.text import unique_names

# Where item texts have categories, in order of preference, and what stands between several (None: there is but one).
CATEGORY_KEYS = {"categories": ",", "class": " ", "brand": None}


def read_categories(path: Path, key: str | None) -> tuple[str, dict[str, set[str]]]:
    """The key that holds them, `key` or the first of CATEGORY_KEYS in use, and item -> its categories.

    A list holds one each; a text is taken as a whole, but for `categories` (between commas) and `class` (words).
    """
    items = read_json(path, "item -> title, description and a category")
    if (wrong := next((item for item, record in items.items() if not isinstance(record, dict)), None)) is not None:
        raise InputError(f"{path}: item {wrong!r} should be an object with a title and a description")
    for name in [key] if key else CATEGORY_KEYS:
        categories = {item: _split(record.get(name), CATEGORY_KEYS.get(name)) for item, record in items.items()}
        members = Counter(category for found in categories.values() for category in found)
        telling = {category for category, count in members.items() if 2 <= count <= len(items) / 2}
        if telling:
            return name, {item: found & telling for item, found in categories.items()}
    sought = f"the key {key!r}" if key else f"any of the keys {', '.join(CATEGORY_KEYS)}"
    raise InputError(f"{path}: no two to half of the items share a category in {sought}; name one by --category_key")


def _split(value: object, separator: str | None) -> set[str]:
    if not isinstance(value, list):
        text = "" if value is None else str(value)
        value = text.split(separator) if separator else [text]
    return {part for each in value if (part := str(each).strip())}


def table(figures: dict[str, dict]) -> str:
    """A line for each figure, a column for each index."""
    lines = []

    def line(name: str, show: Callable[[dict], str], part: str = "", at: int = 0) -> None:
        found = [f[part][at : at + 1] if part else [f] for f in figures.values()]
        lines.append((name, [show(each[0]) if each else "" for each in found]))

    line("items", lambda f: f"{f['items']:,}")
    line("colliding items", lambda f: f"{f['colliding_items']:,}")
    depth = max(len(f["levels"]) for f in figures.values())
    for at in range(depth):
        line(f"level {at + 1}: codes used", lambda level: f"{level['codes_used']:,}", "levels", at)
        line("  perplexity", lambda level: f"{level['perplexity']:.1f}", "levels", at)
    for at in range(depth):
        name = f"first {at + 1} codes" if at else "first code"
        line(f"{name}: groups", lambda p: f"{p['groups']:,}", "prefixes", at)
        line("  items of the largest", lambda p: f"{p['largest'][0]['items']:,}", "prefixes", at)
        if all(p["share_of_all_pairs"] == 0 for f in figures.values() for p in f["prefixes"][at : at + 1]):
            continue  # nothing is shared
        line("  shared by all pairs", lambda p: f"{p['share_of_all_pairs']:.3%}", "prefixes", at)
        if "lift" in next(iter(figures.values()))["prefixes"][0]:
            line("  by pairs of one category", lambda p: f"{p['share_of_category_pairs']:.3%}", "prefixes", at)
            line("  that is times", lambda p: "" if p["lift"] is None else f"{p['lift']:.2f}", "prefixes", at)
    widths = [max(len(cell) for cell in (name, *(cells[at] for _, cells in lines))) for at, name in enumerate(figures)]
    rows = [("", list(figures)), *lines]
    return "\n".join(
        f"{name:<26}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    )


def draw(figures: dict[str, dict], key: str | None, path: Path) -> None:
    """A PNG: perplexity and codes used of each level; beside it what pairs of one category share."""
    from matplotlib.figure import Figure  # a second to import; not for --help

    depth = max(len(f["levels"]) for f in figures.values())
    picture = Figure(figsize=(13 if key else 7, 5), layout="constrained")
    left, *right = np.atleast_1d(picture.subplots(1, 2 if key else 1))
    width = 0.8 / len(figures)
    for at, (name, f) in enumerate(figures.items()):
        colour, places = f"C{at}", np.arange(1, len(f["levels"]) + 1) + (at - (len(figures) - 1) / 2) * width
        left.bar(places, [level["perplexity"] for level in f["levels"]], width * 0.9, color=colour, label=name)
        used = [level["codes_used"] for level in f["levels"]]
        left.bar(places, used, width * 0.9, fill=False, edgecolor=colour)
        for panel in right:
            lifts = {x["length"]: x["lift"] for x in f["prefixes"] if x["lift"]}  # 0 and none have no logarithm
            panel.plot(list(lifts), list(lifts.values()), marker="o", color=colour)
    left.set(title="Perplexity (filled) and codes used (frame)", xlabel="level", ylabel="codes")
    for panel in right:
        panel.axhline(1, color="grey", linewidth=1, linestyle=":")
        panel.set(title=f"Items of one {key} share their first codes", xlabel="first codes shared", yscale="log")
        panel.set_ylabel("times as often as all pairs")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis("{x:g}")
    for panel in (left, *right):
        panel.set_xticks(range(1, depth + 1))
        panel.spines[["top", "right"]].set_visible(False)
    picture.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    picture.savefig(path, format="png", dpi=120)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, nargs="+", help="index files, D.index.json")
    parser.add_argument("--item", type=Path, help="D.item.json with the items' categories")
    parser.add_argument(
        "--category_key", help=f"its key for them (default: the first filled of {', '.join(CATEGORY_KEYS)})"
    )
    parser.add_argument("--output", type=Path, default=Path("results/index"), help="folder (default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    if args.category_key and not args.item:
        raise InputError("--category_key needs --item, the file that has the key")
    if len(set(args.index)) < len(args.index):
        raise InputError("an index file is given twice; name each once")
    started = time.monotonic()

    indices = dict(zip(unique_names(args.index), map(read_codes, args.index), strict=True))
    key, categories = read_categories(args.item, args.category_key) if args.item else (None, None)
    for path, index in zip(args.index, indices.values(), strict=True) if args.item else ():
        if (extra := next((item for item in index if item not in categories), None)) is not None:
            raise InputError(f"{path}: item {extra!r} is not in {args.item}; the files are of different data")
        if (missing := next((item for item in categories if item not in index), None)) is not None:
            raise InputError(f"{path}: item {missing!r} of {args.item} has no index; the files are of different data")

    figures = {name: index_statistics(index, categories) for name, index in indices.items()}
    print(table(figures))
    output_folder(args.output)
    with atomic_write(args.output / "report.png") as temporary:
        draw(figures, key, temporary)
    facts = run_metadata(vars(args) | {"index": list(map(str, args.index))}, started)
    write_json(args.output / "report.json", {"category_key": key, "indices": figures, **facts}, indent=1)
    print(f"{'categories: ' + key + '; ' if key else ''}-> {args.output}/report.json, report.png")


if __name__ == "__main__":
    main()
