"""Make a clean copy of a dataset folder: texts without HTML, no records that commands would refuse.

python -m data.clean --dataset Industrial --data_path ~/datasets --output_path ~/datasets/clean

Texts lose tags, entities and written-out lists as in `data.prepare`; interactions with unknown items, rows with faults
and users without interactions are left out and counted. Semantic IDs, user texts and id maps are copied; embeddings
are not, since they are of the old texts. `data.check` shows what there is to clean.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from data.cleaning import clean_value
from data.health import Health, is_unclean, read_histories, to_lines
from data.health_ratings import usable_rows
from reclingua.datasets import interactions, ratings
from reclingua.datasets.formats import conversion_hint
from reclingua.datasets.item_texts import TEXT_KEYS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import output_folder, read_json


def clean_items(items: dict[str, dict]) -> tuple[dict[str, dict], int]:
    """Return item -> clean texts, and the number of items with a changed title or description."""
    separators = dict.fromkeys(TEXT_KEYS, " ")
    cleaned = {
        item: {
            key: clean_value(value, separators.get(key, ", ")) if isinstance(value, str | list) else value
            for key, value in record.items()
        }
        for item, record in items.items()
    }
    return cleaned, sum(any(is_unclean(record.get(key)) for key in TEXT_KEYS) for record in items.values())


def clean_interactions(folder: Path, name: str, output: Path, max_bad_share: float) -> list[str]:
    """Write the clean files of a next-item dataset; return what was changed."""
    item_path, inter_path = folder / f"{name}.item.json", folder / f"{name}.inter.json"
    total = sum(len(items) for items in read_json(inter_path, "user -> items").values() if isinstance(items, list))
    histories, changes = read_histories(inter_path, Health("")), []
    if item_path.is_file():
        items, num_changed = clean_items(interactions.read_items(item_path))
        histories = {user: [item for item in history if item in items] for user, history in histories.items()}
        (output / item_path.name).write_text(to_lines(items), encoding="utf-8")
        changes.append(f"{num_changed:,} of {len(items):,} items with a cleaned title or description")
    histories = {user: history for user, history in histories.items() if history}
    num_left_out = total - sum(map(len, histories.values()))
    check_share(inter_path, num_left_out, total, max_bad_share, "interactions")
    (output / inter_path.name).write_text(to_lines(histories), encoding="utf-8")
    return [*changes, f"{num_left_out:,} of {total:,} interactions left out"]


def clean_ratings(folder: Path, output: Path, max_bad_share: float) -> list[str]:
    """Write the clean files of a ratings dataset; return what was changed."""
    records = ratings.read_items(folder / "item.json")
    items, num_changed = clean_items(records)
    (output / "item.json").write_text(to_lines(items), encoding="utf-8")
    changes = [f"{num_changed:,} of {len(items):,} items with a cleaned title or description"]
    for part in ratings.PARTS:
        path = folder / f"{part}.parquet"
        total, table = len(ratings.read_table(path)), usable_rows(path, records)
        check_share(path, total - len(table), total, max_bad_share, "rows")
        pq.write_table(table, output / path.name)
        changes.append(f"{total - len(table):,} of {total:,} rows of {part} left out")
    return changes


def check_share(path: Path, num_left_out: int, total: int, max_bad_share: float, kind: str) -> None:
    """Raise InputError if more than a share of the records would be left out."""
    if num_left_out > max_bad_share * total:
        raise InputError(
            f"{path}: {num_left_out:,} of {total:,} {kind} would be left out, more than --max_bad_share "
            f"{max_bad_share:g}; python -m data.check states why"
        )


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="parent folder of the clean <dataset>/")
    parser.add_argument(
        "--max_bad_share", type=float, default=0.01,
        help="share of the interactions that can be left out (default: %(default)s)",
    )  # fmt: skip
    args = one_line_errors(parser).parse_args()
    folder, target = args.data_path / args.dataset, args.output_path / args.dataset
    is_next_item, is_ratings = (folder / f"{args.dataset}.inter.json").is_file(), (folder / "train.parquet").is_file()
    if not is_next_item and not is_ratings:
        hint = conversion_hint(folder, args.dataset) if folder.is_dir() else "see --data_path"
        raise InputError(f"{folder}: no dataset folder; {hint}")
    if target.exists():
        raise InputError(f"{target}: exists; choose another --output_path")

    output_folder(args.output_path)
    changes: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".clean-", dir=args.output_path) as parent:
        output = Path(parent) / args.dataset
        output.mkdir()
        if is_next_item:
            changes += clean_interactions(folder, args.dataset, output, args.max_bad_share)
        if is_ratings:
            changes += clean_ratings(folder, output, args.max_bad_share)
        for path in sorted(folder.iterdir()):
            is_copied = path.is_file() and not path.is_symlink() and path.suffix != ".npy"
            if is_copied and not (output / path.name).exists():
                shutil.copyfile(path, output / path.name)
        os.replace(output, target)
    print(f"{args.dataset}: clean copy in {target}/", *changes, sep="\n  ")
    if any(folder.glob("*.npy")):
        print("  embeddings are not copied: run python -m index.embed on the clean texts")


if __name__ == "__main__":
    main()
