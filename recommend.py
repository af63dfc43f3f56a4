"""Write the best items of every user, the neighbours of every item, or the scores of pairs, to a file.

A killed run resumes with the same command. Under torchrun the users are shared out among its processes.

python recommend.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --k 20 --output recommendations.parquet
python recommend.py --ckpt_path ckpt/ml-100k/lcrec --histories users.csv --exclude_seen --output lists.csv
python recommend.py --ckpt_path ckpt/ml-100k/lcrec --item_to_item --output neighbours.jsonl
python recommend.py --ckpt_path ckpt/ml-1m/collm-mf --pairs pairs.parquet --output scores.parquet
torchrun --nproc_per_node 2 recommend.py --ckpt_path ckpt/ml-100k/lcrec --output recommendations.parquet
"""

from reclingua.utils.logging import silence_third_party

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from reclingua import Recommender, Scorer
from reclingua.inference.arguments import RECOMMEND_INPUTS, build_recommend_parser, check_recommend_flags
from reclingua.inference.fusion import FUSION_FILE, checkpoint_sha256, load_fusion
from reclingua.inference.loading import load_metadata
from reclingua.inference.rating_fusion import load_rating_fusion
from reclingua.inference.request_files import Pair, User, count_histories, read_histories, read_item_list, read_pairs
from reclingua.inference.shards import ShardedOutput, shard_size
from reclingua.inference.user_lists import PairScores, UserLists, list_lengths
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.files import check_outputs
from reclingua.utils.hub import trust_remote_code
from reclingua.utils.metadata import METADATA_FILE
from reclingua.utils.processes import Processes, claim_device
from reclingua.utils.provenance import file_sha256


class Requests(NamedTuple):
    """Requests as a stream that can be read twice, and the object that answers them.

    Args:
        unit: what a request is ("user").
        files: of the dataset.
        notes: what was left out, clauses of a sentence.
    """

    unit: str
    count: int
    read: Callable[[], Iterator[User]] | Callable[[], Iterator[Pair]]
    answers: UserLists | PairScores
    files: list[Path]
    notes: list[str]


@cli_main
def main() -> None:
    args = build_recommend_parser(__doc__).parse_args()
    silence_third_party()
    trust_remote_code(args.trust_remote_code)
    check_recommend_flags(args)
    device, processes = claim_device(args.gpu_id), Processes()

    # ---- Checkpoint and requests ----
    metadata = load_metadata(args.ckpt_path)
    if metadata.tasks == ["next_item"]:
        raise InputError(f"{args.ckpt_path}: is a baseline of next items; give a checkpoint of finetune.py")
    if metadata.method == "lcrec":
        requests = open_lists(args, device)
    else:
        requests = open_pairs(args, device)
    inputs = {f"--{name}": path for name in RECOMMEND_INPUTS if (path := getattr(args, name))}
    check_outputs({"--output": args.output}, inputs | {f"{path.name} of the dataset": path for path in requests.files})

    # ---- Answers, shard by shard ----
    started, lengths = time.monotonic(), Counter()
    output = ShardedOutput(args.output, shard_size(requests.count, args.batch_size), requests.count, processes)
    with output.opened(describe_inputs(args, requests, inputs) if processes.is_main else {}) as done:
        if done and processes.is_main:
            print(f"resuming: {done:,} of {output.num_shards:,} shards are written", flush=True)
        total, written = (number // processes.count for number in (requests.count, done * output.size))
        hidden = None if processes.is_main else True  # None: unless a terminal shows it
        with tqdm(total=total, initial=written, unit=requests.unit, leave=False, disable=hidden) as bar:
            for count in output.write(requests.read(), requests.answers.rows):
                bar.update(count)
        num_rows = output.join(lambda table: lengths.update(list_lengths(table)))
    if processes.is_main:
        print_summary(args, requests, num_rows, lengths, None if done else time.monotonic() - started)


def open_lists(args: argparse.Namespace, device: str) -> Requests:
    """Return the histories of users or of items, to be answered by a next-item model."""
    if args.pairs:
        raise InputError(f"--pairs: {args.ckpt_path} ranks next items, it scores no pairs; leave --pairs out")
    where = {"dataset": args.dataset, "index_file": args.index_file, "base_model": args.base_model}
    recommender = Recommender.from_pretrained(args.ckpt_path, args.data_path, device=device, **where)
    dataset, fused = recommender.dataset, None
    notes = restrict_items(args, recommender)
    options = {"exclude_seen": args.exclude_seen or args.item_to_item, "batch_size": args.batch_size}
    if args.fuse:
        fused = load_fusion(args.ckpt_path, recommender, options["exclude_seen"])
        if fused is None:
            seen = "with --exclude_seen" if options["exclude_seen"] else "without --exclude_seen"
            raise InputError(f"--fuse: {args.ckpt_path} holds no fusion {seen}; fit one so with python test.py --fuse")
    else:
        options["num_beams"] = args.num_beams or max(args.k, 20)

    def read() -> Iterator[User]:
        if args.item_to_item:
            return ((item, [item]) for item in dataset.item_ids)
        return read_histories(args.histories) if args.histories else iter(dataset.histories.items())

    unit = "item" if args.item_to_item else "user"
    counts = count_histories(read(), dataset.index, args.histories)
    if counts.unknown_items:
        notes.append(f"{counts.unknown_items:,} interactions with unknown items were dropped")
    if counts.without_items:
        notes.append(f"{counts.without_items:,} {unit}s without a known item got the most popular ones")
    lists = UserLists(recommender, args.k, fused, args.item_to_item, args.bf16, **options)
    files = [path for path in dataset.files.values() if path.exists()]
    files += [dataset.file_path(args.index_file)] if args.index_file else []
    return Requests(unit, counts.users, read, lists, files, notes)


def restrict_items(args: argparse.Namespace, recommender: Recommender) -> list[str]:
    """Restrict what is recommended to --candidates without --exclude_items; return notes on unknown items."""
    items, notes = set(recommender.dataset.index), []
    for flag, path in (("--candidates", args.candidates), ("--exclude_items", args.exclude_items)):
        if path is None:
            continue
        listed = read_item_list(path)
        if unknown := len(listed - recommender.dataset.index.keys()):
            notes.append(f"{unknown:,} items of {flag} are unknown")
        items = items & listed if flag == "--candidates" else items - listed
    if not items:
        raise InputError("--candidates, --exclude_items: they leave no item to recommend")
    if len(items) < len(recommender.dataset.index):
        recommender.restrict(items)
    return notes


def open_pairs(args: argparse.Namespace, device: str) -> Requests:
    """Return pairs of user and item, to be scored by a Yes/No or collaborative model."""
    if args.pairs is None:
        raise InputError(f"{args.ckpt_path}: scores pairs of user and item, it makes no lists; give --pairs FILE")
    scorer = Scorer.from_pretrained(
        args.ckpt_path,
        args.data_path,
        dataset=args.dataset,
        base_model=args.base_model,
        cf_model=args.cf_model,
        device=device,
    )
    if args.bf16 and not scorer.templates:
        raise InputError(f"--bf16: {args.ckpt_path} is a collaborative model, which computes in float32; leave it out")
    fused = load_rating_fusion(args.ckpt_path, scorer) if args.fuse else None
    if args.fuse and fused is None:
        raise InputError(f"--fuse: {args.ckpt_path} holds no fusion; fit one with python test.py --fuse like-rates")
    answers, dataset, notes = PairScores(scorer, args.batch_size, args.bf16, fused), scorer.dataset, []
    count = unknown_items = unknown_users = 0
    for user, item in read_pairs(args.pairs):
        count += 1
        unknown_items += item not in dataset.items
        unknown_users += item in dataset.items and user not in answers.liked
    if not count:
        raise InputError(f"{args.pairs}: has no pairs")
    if unknown_items:
        notes.append(f"{unknown_items:,} pairs with unknown items were dropped")
    if unknown_users:
        notes.append(f"{unknown_users:,} pairs are of users without ratings, asked without a history")
    files = [dataset.folder / name for name in ("train.parquet", "valid.parquet", "test.parquet", "item.json")]
    return Requests("pair", count, lambda: read_pairs(args.pairs), answers, files, notes)


def describe_inputs(args: argparse.Namespace, requests: Requests, inputs: dict[str, Path]) -> dict[str, object]:
    """Return what the output is made from: flags, and fingerprints of all files; shards of others are refused."""
    flags = ("k", "exclude_seen", "item_to_item", "fuse", "num_beams", "batch_size", "bf16", "base_model", "cf_model")
    made_from: dict[str, object] = {f"--{name}": getattr(args, name) for name in flags}
    made_from |= {name: file_sha256(path) for name, path in inputs.items()}
    made_from |= {path.name: file_sha256(path) for path in requests.files}
    names = [METADATA_FILE, *([FUSION_FILE] if args.fuse else [])]
    made_from |= {f"{name} of --ckpt_path": file_sha256(args.ckpt_path / name) for name in names}
    return made_from | {"model of --ckpt_path": checkpoint_sha256(args.ckpt_path)}


def print_summary(
    args: argparse.Namespace, requests: Requests, num_rows: int, lengths: Counter, seconds: float | None
) -> None:
    """Print the size of the output, how long it took unless it was resumed, and a line on what was left out."""
    took = f" in {seconds:.1f} s ({requests.count / seconds:.1f} a second)" if seconds else ""
    print(f"{args.output}: {num_rows:,} rows for {requests.count:,} {requests.unit}s{took}")
    notes = list(requests.notes)
    if isinstance(requests.answers, UserLists) and (short := requests.count - lengths[args.k]):
        notes.append(f"{short:,} {requests.unit}s have fewer than {args.k} items left")
    if notes:
        print("; ".join(notes))


if __name__ == "__main__":
    main()
