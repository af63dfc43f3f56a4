"""Generate unique semantic IDs from item embeddings, with the RQ-VAE of index.train.

python -m index.generate --dataset ml-100k --rqvae ckpt/ml-100k/rqvae
python -m index.generate --dataset ml-100k --random      # random codes, as a baseline

A semantic ID is a short sequence of codes, one per level: similar items share their first codes. LC-Rec calls it an
item index, hence the name of the output, D.index.json.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from index.codes import LETTERS, check_sizes, default_sizes, random_codes, to_tokens
from index.collisions import count_collisions, reassign_by_sinkhorn, resolve_collisions
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


def load_rqvae(args: argparse.Namespace, dataset: InteractionDataset) -> tuple[RQVAE, torch.Tensor, dict]:
    """Load the model of --rqvae and its item embeddings, float32 [items, dim].

    Returns:
        (model, embeddings, what semantic IDs of them are made with).

    Raises:
        InputError: a file is missing; the embeddings are of other items, or not those that the model was trained on.
    """
    if not all((args.rqvae / name).exists() for name in ("config.json", "model.safetensors", "run.json")):
        raise InputError(f"{args.rqvae}: contains no RQ-VAE; train one with python -m index.train")
    path, expected = find_embeddings(args, dataset)
    embeddings = read_embeddings(path, rows=len(dataset.item_ids))
    check_made_from(path, dataset, f"python -m index.embed --force with the flags in {record_path(path)}")
    disable_progress_bar()
    model = RQVAE.from_pretrained(args.rqvae).eval().requires_grad_(False)
    if embeddings.shape[1] != model.config.input_dim:
        raise InputError(
            f"{args.rqvae}: expects embeddings of width {model.config.input_dim}, got width {embeddings.shape[1]}; "
            "see --embeddings"
        )
    sha256 = file_sha256(path)
    if expected not in (None, sha256):
        raise InputError(
            f"{path}: is not the file that {args.rqvae} was trained on; give that one as --embeddings, or train "
            f"again: python -m index.train --embeddings {path} --output_dir {args.rqvae} --force"
        )
    made_with = {"rqvae_sha256": file_sha256(args.rqvae / "model.safetensors"), "embeddings_sha256": sha256}
    return model, torch.from_numpy(embeddings), made_with


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


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--rqvae", type=Path, help="folder written by index.train, with any --method")
    source.add_argument("--random", action="store_true", help="random codes; no embeddings are read")
    parser.add_argument("--embeddings", type=Path, help="item embeddings (default: those that --rqvae was trained on)")
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.index.json")
    parser.add_argument("--force", action="store_true", help="replace an index that was made from something else")
    parser.add_argument(
        "--codebook_sizes", type=int, nargs="+", help="codes of each level, with --random (default: as index.train)"
    )
    parser.add_argument("--seed", type=int, help="random seed, with --random (default: 42)")
    args = one_line_errors(parser).parse_args()
    for flag in ("embeddings",) if args.random else ("codebook_sizes", "seed"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} has no effect with --{'random' if args.random else 'rqvae'}; leave it out")

    started = time.monotonic()
    dataset = open_interactions(args.data_path, args.dataset, needs=["items"])
    output = args.output or dataset.folder / f"{dataset.name}.index.json"
    check_outputs({"--output": output}, {"--embeddings": args.embeddings, **dataset.files})
    made_with: dict[str, object] = {"texts": dataset.sha256("texts")}
    if args.random:
        sizes = args.codebook_sizes or default_sizes(len(dataset.item_ids))
        seed = 42 if args.seed is None else args.seed
        check_sizes(sizes, len(dataset.item_ids))
        made_with |= {"random_codebook_sizes": sizes, "seed": seed}
        check_replaceable(output, made_with, args.force)
        codes = random_codes(sizes, len(dataset.item_ids), seed)
    else:
        model, embeddings, sources = load_rqvae(args, dataset)
        made_with |= sources
        check_replaceable(output, made_with, args.force)
        sizes, codes = model.config.codebook_sizes, assign_codes(model, embeddings)
    with atomic_write(output) as temporary:
        write_json(temporary, dict(zip(dataset.item_ids, to_tokens(codes), strict=True)))
        write_record(output, made_with, run_metadata(vars(args), started), written=temporary)
    for level, column in enumerate(codes.T):
        print(
            f"  level {LETTERS[level]}: {len(np.unique(column))} of {sizes[level]} codes used, "
            f"perplexity {perplexity(column):.1f}"
        )
    print(f"{len(codes):,} semantic IDs of {codes.shape[1]} codes -> {output}")


if __name__ == "__main__":
    main()
