"""Turn item embeddings into item indices with a trained RQ-VAE; no two items ever share one.

python -m index.generate --dataset ml-100k --rqvae ckpt/ml-100k/rqvae
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from data.dataset import open_dataset, read_embeddings, write_json
from errors import InputError, exits_cleanly, one_line
from index.collisions import colliding, move_to_free, spread
from index.rqvae import RQVAE

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def perplexity(codes: np.ndarray) -> float:
    """Effective number of codes in use: exp of the entropy of int codes [items]."""
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="holds <dataset>/ (default: %(default)s)")
    parser.add_argument("--rqvae", type=Path, required=True, help="folder written by index.train")
    parser.add_argument("--embeddings", type=Path, help="default: <data_path>/<dataset>/<dataset>.emb-minilm-td.npy")
    parser.add_argument("--output", type=Path, help="default: <data_path>/<dataset>/<dataset>.index.json")
    args = one_line(parser).parse_args()

    dataset = open_dataset(args.data_path, args.dataset, needs=["items"])
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
    if len(model.codebooks) > len(LETTERS):
        raise InputError(f"{args.rqvae}: has {len(model.codebooks)} levels; at most {len(LETTERS)} can be named")

    latents = model.encode(torch.from_numpy(embeddings))
    nearest = model.quantize(latents, balanced=False)[1].numpy()
    balanced = spread(model, latents, nearest)
    codes = move_to_free(model, latents, balanced)
    assert not colliding(codes)

    output = args.output or dataset.folder / f"{dataset.name}.index.json"
    tokens = [[f"<{LETTERS[level]}_{code}>" for level, code in enumerate(row)] for row in codes.tolist()]
    write_json(output, dict(zip(dataset.item_ids, tokens, strict=True)))
    before, after = colliding(nearest), colliding(balanced)
    print(f"colliding items: {before:,} with nearest codes, {after:,} after Sinkhorn, 0 at the end")
    for level, column in enumerate(codes.T):
        print(
            f"  level {LETTERS[level]}: {len(np.unique(column))} of {model.config.codebook_sizes[level]} codes used, "
            f"perplexity {perplexity(column):.1f}"
        )
    print(f"{len(codes):,} items, {codes.shape[1]} codes each -> {output}")


if __name__ == "__main__":
    main()
