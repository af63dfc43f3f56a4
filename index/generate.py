"""Turn item embeddings into item indices with what index.train found; no two items ever share one.

python -m index.generate --dataset ml-100k --rqvae ckpt/ml-100k/rqvae
python -m index.generate --dataset ml-100k --random      # codes drawn at random, to compare with
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from index.codes import LETTERS, check_sizes, default_sizes, random_codes, to_tokens
from index.collisions import count_collisions, reassign_by_sinkhorn, resolve_collisions
from index.kmeans import balanced_codes
from index.rqvae import RQVAE
from reclingua.datasets.interactions import RecDataset, open_dataset, read_embeddings
from reclingua.metrics.index import perplexity
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import write_json


def load_rqvae(args: argparse.Namespace, dataset: RecDataset) -> tuple[RQVAE, torch.Tensor]:
    """The model of --rqvae and the embeddings of the items, float32 [items, dim]; InputError where they do not fit."""
    embeddings = read_embeddings(
        args.embeddings or dataset.folder / f"{dataset.name}.emb-minilm-td.npy", rows=len(dataset.item_ids)
    )
    if not all((args.rqvae / name).exists() for name in ("config.json", "model.safetensors", "run.json")):
        raise InputError(f"{args.rqvae}: holds no RQ-VAE; train one with python -m index.train")
    disable_progress_bar()
    model = RQVAE.from_pretrained(args.rqvae).eval().requires_grad_(False)
    if embeddings.shape[1] != model.config.input_dim:
        raise InputError(
            f"{args.rqvae}: expects embeddings {model.config.input_dim} wide, these are {embeddings.shape[1]} wide"
        )
    return model, torch.from_numpy(embeddings)


def assign_codes(model: RQVAE, embeddings: torch.Tensor) -> np.ndarray:
    """Distinct codes int64 [items, levels] of embeddings float32 [items, dim]; says how many collided on the way."""
    latents = model.encode(embeddings)
    if model.config.balanced_assignment:
        first, way = balanced_codes(latents, model.codebooks), "balanced"
    else:
        first, way = model.quantize(latents, balanced=False)[1].numpy(), "nearest"
    spread_out = reassign_by_sinkhorn(model, latents, first)
    codes = resolve_collisions(model, latents, spread_out)
    assert not count_collisions(codes)
    after = f"{count_collisions(spread_out):,} after Sinkhorn, " if model.config.sinkhorn_epsilon else ""
    print(f"colliding items: {count_collisions(first):,} with {way} codes, {after}0 at the end")
    return codes


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="holds <dataset>/ (default: %(default)s)")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--rqvae", type=Path, help="folder written by index.train, with any --method")
    way.add_argument("--random", action="store_true", help="draw the codes at random; reads no embeddings")
    parser.add_argument("--embeddings", type=Path, help="default: <data_path>/<dataset>/<dataset>.emb-minilm-td.npy")
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.index.json")
    parser.add_argument("--codebook_sizes", type=int, nargs="+", help="with --random (default: as index.train's)")
    parser.add_argument("--seed", type=int, help="with --random (default: 42)")
    args = one_line_errors(parser).parse_args()
    for flag in ("embeddings",) if args.random else ("codebook_sizes", "seed"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} means nothing with --{'random' if args.random else 'rqvae'}; leave it out")

    dataset = open_dataset(args.data_path, args.dataset, needs=["items"])
    if args.random:
        sizes = args.codebook_sizes or default_sizes(len(dataset.item_ids))
        check_sizes(sizes, len(dataset.item_ids))
        codes = random_codes(sizes, len(dataset.item_ids), 42 if args.seed is None else args.seed)
    else:
        model, embeddings = load_rqvae(args, dataset)
        sizes, codes = model.config.codebook_sizes, assign_codes(model, embeddings)
    output = args.output or dataset.folder / f"{dataset.name}.index.json"
    write_json(output, dict(zip(dataset.item_ids, to_tokens(codes), strict=True)))
    for level, column in enumerate(codes.T):
        print(
            f"  level {LETTERS[level]}: {len(np.unique(column))} of {sizes[level]} codes used, "
            f"perplexity {perplexity(column):.1f}"
        )
    print(f"{len(codes):,} items, {codes.shape[1]} codes each -> {output}")


if __name__ == "__main__":
    main()
