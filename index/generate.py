"""Generate unique semantic IDs from item embeddings, with the RQ-VAE of index.train.

python -m index.generate --dataset ml-100k --rqvae ckpt/ml-100k/rqvae
python -m index.generate --dataset ml-100k --random      # random codes, as a baseline
python -m index.generate --dataset ml-100k --extend data/ml-100k/ml-100k.index.json      # semantic IDs for new items

A semantic ID is a short sequence of codes, one per level: similar items share their first codes. LC-Rec calls it an
item index, hence the name of the output, D.index.json.

--extend keeps the semantic IDs of an index and adds free ones for the items that it lacks, with the same RQ-VAE. A
model that was tuned on the index opens with the extended one, and can recommend the new items.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from index.codes import LETTERS, check_sizes, default_sizes, random_codes, to_tokens
from index.collisions import assign_free_codes, count_collisions, reassign_by_sinkhorn, resolve_collisions
from index.embed import embed_new_items
from index.extension import find_rqvae, open_index, parse_codes
from index.kmeans import balanced_codes
from index.rqvae import RQVAE
from reclingua.datasets.interactions import InteractionDataset, check_made_from, open_interactions, read_embeddings
from reclingua.metrics.index import perplexity
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, check_outputs, read_json, write_json
from reclingua.utils.metadata import run_metadata
from reclingua.utils.provenance import check_replaceable, file_sha256, read_record, record_path, write_record


def find_embeddings(args: argparse.Namespace, dataset: InteractionDataset) -> tuple[Path, str | None]:
    """Return the embeddings of --embeddings, else those that --rqvae was trained on, and the SHA-256 of the latter.

    An RQ-VAE without a record of its embeddings (None) gets D.emb-minilm-td.npy, and a line states it.
    """
    if (record := read_record(args.rqvae)) is None:
        path = args.embeddings or dataset.folder / f"{dataset.name}.emb-minilm-td.npy"
        print(f"{args.rqvae} does not state its embeddings: {path} cannot be checked against them")
        return path, None
    run = read_json(args.rqvae / "run.json", "the settings of an RQ-VAE")
    path = args.embeddings or Path(str(run.get("embeddings")))
    if not args.embeddings and not path.exists():
        path = dataset.folder / path.name  # the data have moved
    return path, str(record.get("embeddings_sha256"))


def load_rqvae(folder: Path) -> RQVAE:
    """Load the RQ-VAE in `folder`, frozen; InputError if there is none."""
    if not all((folder / name).exists() for name in ("config.json", "model.safetensors", "run.json")):
        raise InputError(f"{folder}: contains no RQ-VAE; train one with python -m index.train")
    disable_progress_bar()
    return RQVAE.from_pretrained(folder).eval().requires_grad_(False)


def load_embeddings(
    path: Path, dataset: InteractionDataset, items: Sequence[str], args: argparse.Namespace, model: RQVAE
) -> torch.Tensor:
    """Load the embeddings of `items`, float32 [items, dim], from a file with a row for each item of the dataset.

    Raises:
        InputError: the file is of other items, or of another width than the RQ-VAE reads.
    """
    embeddings = read_embeddings(path, rows=len(dataset.item_ids))
    check_made_from(path, dataset, f"python -m index.embed --force with the flags in {record_path(path)}")
    if embeddings.shape[1] != model.config.input_dim:
        raise InputError(
            f"{args.rqvae}: expects embeddings of width {model.config.input_dim}, got width {embeddings.shape[1]}; "
            "see --embeddings"
        )
    row_of = {item: row for row, item in enumerate(dataset.item_ids)}
    return torch.from_numpy(embeddings[[row_of[item] for item in items]])


def check_trained_on(path: Path, expected: str | None, args: argparse.Namespace) -> str:
    """Return the SHA-256 of the embeddings at `path`; InputError if it is not `expected`, that of --rqvae's."""
    sha256 = file_sha256(path)
    if expected not in (None, sha256):
        raise InputError(
            f"{path}: is not the file that {args.rqvae} was trained on; give that one as --embeddings, or train "
            f"again: python -m index.train --embeddings {path} --output_dir {args.rqvae} --force"
        )
    return sha256


def assign_codes(model: RQVAE, embeddings: torch.Tensor) -> np.ndarray:
    """Assign unique codes int64 [items, levels] to embeddings float32 [items, dim], and print the collisions."""
    latents = model.encode(embeddings)
    if model.config.balanced:
        initial, strategy = balanced_codes(latents, model.codebooks), "balanced"
    else:
        initial, strategy = model.quantize(latents, use_sinkhorn=False)[1].numpy(), "nearest"
    reassigned = reassign_by_sinkhorn(model, latents, initial)
    codes = resolve_collisions(model, latents, reassigned)
    assert not count_collisions(codes)
    after_sinkhorn = f"{count_collisions(reassigned):,} after Sinkhorn, " if model.config.sinkhorn_epsilon else ""
    print(f"colliding items: {count_collisions(initial):,} with {strategy} codes, {after_sinkhorn}0 at the end")
    return codes


@dataclass(frozen=True)
class SemanticIds:
    """Semantic IDs of all items.

    Args:
        items: item ids.
        codes: int64 [items, levels].
        sizes: number of codes of each level.
        made_with: settings and fingerprints for the record.
    """

    items: Sequence[str]
    codes: np.ndarray
    sizes: Sequence[int]
    made_with: dict[str, object]


# Each strategy refuses to replace another file at `output`, unless --force is given, before its work.


def generate_random(args: argparse.Namespace, dataset: InteractionDataset, output: Path) -> SemanticIds:
    """Draw distinct random codes; InputError if there are more items than semantic IDs."""
    items = dataset.item_ids
    sizes, seed = args.codebook_sizes or default_sizes(len(items)), 42 if args.seed is None else args.seed
    check_sizes(sizes, len(items))
    made_with = {"texts": dataset.sha256("texts"), "random_codebook_sizes": sizes, "seed": seed}
    check_replaceable(output, made_with, args.force)
    return SemanticIds(items, random_codes(sizes, len(items), seed), sizes, made_with)


def generate_from_rqvae(args: argparse.Namespace, dataset: InteractionDataset, output: Path) -> SemanticIds:
    """Quantize the embeddings that --rqvae was trained on, and resolve collisions."""
    model = load_rqvae(args.rqvae)
    path, expected = find_embeddings(args, dataset)
    embeddings = load_embeddings(path, dataset, dataset.item_ids, args, model)
    made_with = {"texts": dataset.sha256("texts"), "rqvae_sha256": file_sha256(args.rqvae / "model.safetensors")}
    made_with |= {"embeddings_sha256": check_trained_on(path, expected, args)}
    check_replaceable(output, made_with, args.force)
    codes = assign_codes(model, embeddings)
    return SemanticIds(dataset.item_ids, codes, model.config.codebook_sizes, made_with)


def extend_index(args: argparse.Namespace, dataset: InteractionDataset, output: Path) -> SemanticIds:
    """Keep the semantic IDs of --extend, and quantize the items that it lacks with the RQ-VAE it was made with.

    New items get free codes of those in use. They are embedded as the items were that the RQ-VAE was trained on, or
    by --embeddings.
    """
    index = open_index(args.extend, dataset, args.force)
    args.rqvae = find_rqvae(args.extend, args.rqvae)
    model = load_rqvae(args.rqvae)
    codes = parse_codes(args.extend, index, model.config.codebook_sizes)
    made_with = {"texts": dataset.sha256("texts"), "extends_sha256": file_sha256(args.extend)}
    made_with |= {"rqvae_sha256": file_sha256(args.rqvae / "model.safetensors")}
    if args.embeddings:
        made_with["embeddings_sha256"] = file_sha256(args.embeddings)
    else:
        path, expected = find_embeddings(args, dataset)
        made_with["embeddings_sha256"] = check_trained_on(path, expected, args)
        made_with["interactions"] = dataset.sha256("train_histories")
    if output.resolve() != args.extend.resolve():
        check_replaceable(output, made_with, args.force)
    new = [item for item in dataset.item_ids if item not in index]
    print(f"{len(new):,} items of {dataset.folder} are not in {args.extend}")
    if new:
        if args.embeddings:
            embeddings = load_embeddings(path := args.embeddings, dataset, new, args, model)
        else:
            embeddings = torch.from_numpy(embed_new_items(path, dataset, new))
        codes = np.concatenate([codes, assign_free_codes(model, model.encode(embeddings), codes)])
    return SemanticIds([*index, *new], codes, model.config.codebook_sizes, made_with)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--rqvae", type=Path,
        help="folder written by index.train, with any --method (default with --extend: that of the index)",
    )  # fmt: skip
    source.add_argument("--random", action="store_true", help="random codes; no embeddings are read")
    parser.add_argument(
        "--extend", type=Path, help="index file whose semantic IDs stay; new items get free ones, by the same RQ-VAE"
    )
    parser.add_argument(
        "--embeddings", type=Path,
        help="item embeddings (default: those that --rqvae was trained on; with --extend the new items are embedded "
        "as those were)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.index.json, or the file of --extend"
    )
    parser.add_argument("--force", action="store_true", help="replace an index that was made from something else")
    parser.add_argument(
        "--codebook_sizes", type=int, nargs="+", help="codes of each level, with --random (default: as index.train)"
    )
    parser.add_argument("--seed", type=int, help="random seed, with --random (default: 42)")
    args = one_line_errors(parser).parse_args()
    if not (args.rqvae or args.random or args.extend):
        raise InputError("one of the arguments --rqvae --random is required, or --extend; see --help")
    for flag in ("embeddings", "extend") if args.random else ("codebook_sizes", "seed"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} has no effect with --{'random' if args.random else 'rqvae'}; leave it out")

    started = time.monotonic()
    dataset = open_interactions(args.data_path, args.dataset, needs=["items"])
    output = args.output or args.extend or dataset.folder / f"{dataset.name}.index.json"
    check_outputs({"--output": output}, {"--embeddings": args.embeddings, **dataset.files})
    strategy = extend_index if args.extend else generate_random if args.random else generate_from_rqvae
    ids = strategy(args, dataset, output)
    with atomic_write(output) as temporary:
        write_json(temporary, dict(zip(ids.items, to_tokens(ids.codes), strict=True)))
        write_record(output, ids.made_with, run_metadata(vars(args), started), written=temporary)
    for level, column in enumerate(ids.codes.T):
        print(
            f"  level {LETTERS[level]}: {len(np.unique(column))} of {ids.sizes[level]} codes used, "
            f"perplexity {perplexity(column):.1f}"
        )
    print(f"{len(ids.codes):,} semantic IDs of {ids.codes.shape[1]} codes -> {output}")


if __name__ == "__main__":
    main()
