"""Hide a share of the items from training, to measure how a model recommends items that are new to it.

python -m data.split_cold --dataset ml-100k

Two dataset folders are written beside that of the dataset:

D-warm   without the hidden items: embeddings, semantic IDs and the model are made from it
D-cold   all items; an interaction with a hidden item is left out, unless it is the last of its user, the test target

The training histories of D-warm begin those of D-cold, so that a model of D-warm is tested on D-cold, with semantic
IDs of index.generate --extend.
"""

import argparse
import random
import shutil
from pathlib import Path

from reclingua.datasets.interactions import InteractionDataset, open_interactions
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder, read_json, write_json

Histories = dict[str, list[str]]


def split_histories(dataset: InteractionDataset, hidden: set[str]) -> tuple[Histories, Histories]:
    """Return the histories of D-warm and of D-cold; users without interactions are left out."""
    warm, cold = {}, {}
    for user, (*earlier, target) in dataset.histories.items():
        kept = [item for item in earlier if item not in hidden]
        warm[user] = kept if target in hidden else [*kept, target]
        # With fewer than three interactions all would be training, the target as well.
        cold[user] = [*kept, target] if len(kept) >= 2 else warm[user]
    return tuple({user: items for user, items in part.items() if items} for part in (warm, cold))  # type: ignore


def write_dataset(
    dataset: InteractionDataset, folder: Path, name: str, histories: Histories, hidden: set[str]
) -> None:
    """Write the files of a dataset `name` into `folder`, without the texts of `hidden` items."""
    write_json(folder / f"{name}.inter.json", histories)
    if (texts := dataset.file_path(".item.json")).exists():
        items = {item: record for item, record in read_json(texts, "item texts").items() if item not in hidden}
        write_json(folder / f"{name}.item.json", items, indent=1)
    for suffix in (".item2id", ".user2id"):
        if (path := dataset.file_path(suffix)).exists():
            shutil.copyfile(path, folder / f"{name}{suffix}")


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the dataset D")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument("--output_path", type=Path, help="parent folder of D-warm/ and D-cold/ (default: --data_path)")
    parser.add_argument("--share", type=float, default=0.1, help="share of items to hide (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    dataset = open_interactions(args.data_path, args.dataset)
    number = round(args.share * len(dataset.item_ids)) if 0 < args.share < 1 else 0
    if not number:
        raise InputError(f"--share {args.share}: should be between 0 and 1, and hide at least one item")
    hidden = set(random.Random(args.seed).sample(dataset.item_ids, number))
    warm, cold = split_histories(dataset, hidden)
    num_targets = sum(len(history) >= 3 and history[-1] in hidden for history in cold.values())
    if not num_targets or all(len(history) < 3 for history in warm.values()):
        raise InputError(
            f"{dataset.folder}: with {number:,} hidden items no test target is hidden, or no user is left with three "
            "interactions; give another --share or --seed"
        )
    folders = [(args.output_path or args.data_path) / f"{dataset.name}-{part}" for part in ("warm", "cold")]
    with atomic_folder(folders[0]) as warm_folder, atomic_folder(folders[1]) as cold_folder:
        write_dataset(dataset, warm_folder, folders[0].name, warm, hidden)
        write_dataset(dataset, cold_folder, folders[1].name, cold, set())
    num_left_out = sum(map(len, dataset.histories.values())) - sum(map(len, cold.values()))
    print(f"{dataset.name}: {number:,} of {len(dataset.item_ids):,} items hidden, seed {args.seed}")
    print(f"  {folders[0]}/: {len(warm):,} users, without the hidden items; train on it")
    print(f"  {folders[1]}/: {len(cold):,} users, {num_targets:,} test targets hidden; test on it")
    print(f"  {num_left_out:,} interactions with hidden items are left out of both")


if __name__ == "__main__":
    main()
