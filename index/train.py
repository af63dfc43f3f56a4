"""Train the codebooks of semantic IDs on item embeddings: RQ-VAE, or residual k-means as a baseline.

python -m index.train --embeddings data/ml-100k/ml-100k.emb-minilm-td.npy --output_dir ckpt/ml-100k/rqvae
python -m index.train --method kmeans --embeddings data/D/D.emb-minilm-td.npy --output_dir ckpt/D/kmeans

--method rqvae             as in LC-Rec; --sinkhorn_epsilon 0 turns Sinkhorn off
--method kmeans            every level clusters the residuals of the levels before it
--method balanced-kmeans   the same with equally large clusters

The output is an RQ-VAE folder; with k-means the model has no encoder and no decoder. Its run.json names the embeddings
and holds their SHA-256: index.generate reads these and no others.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from index.codes import check_sizes, default_sizes
from index.collisions import count_collisions
from index.kmeans import fill_codebooks
from index.rqvae import RQVAE, RQVAEConfig
from reclingua.datasets.interactions import read_embeddings
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder, output_folder
from reclingua.utils.metadata import run_metadata
from reclingua.utils.provenance import check_replaceable, file_sha256, write_record

METHODS = ("rqvae", "kmeans", "balanced-kmeans")
RQVAE_FLAGS = ("code_dim", "hidden_sizes", "epochs", "batch_size", "learning_rate", "weight_decay")


def train(embeddings: torch.Tensor, config: RQVAEConfig, args: argparse.Namespace) -> tuple[RQVAE, list[dict]]:
    """Train an RQ-VAE on embeddings float32 [items, dim]; return it with its learning curve."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings = embeddings.to(device)
    model = RQVAE(config).to(device)
    model.fit_scale(embeddings)
    batch_size = min(args.batch_size, len(embeddings))
    sample = embeddings[torch.randperm(len(embeddings), device=device)[:batch_size]]
    fill_codebooks(model.encode(sample).detach(), model.codebooks, args.seed)

    steps = args.epochs * -(-len(embeddings) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    curve, report_every = [], max(1, args.epochs // 10)
    for epoch in tqdm(range(1, args.epochs + 1), desc="rq-vae", unit="epoch", disable=None):
        total = np.zeros(2)
        for rows in torch.randperm(len(embeddings), device=device).split(batch_size):
            output = model(embeddings[rows])
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += np.array([output.reconstruction_loss.item(), output.rq_loss.item()]) * len(rows)
        if epoch % report_every == 0 or epoch == args.epochs:
            reconstruction, rq = total / len(embeddings)
            with torch.no_grad():
                codes = model(embeddings, use_sinkhorn=False).codes.cpu().numpy()
            curve.append(
                {
                    "epoch": epoch,
                    "reconstruction": reconstruction,
                    "rq": rq,
                    "colliding_items": count_collisions(codes),
                }
            )
            tqdm.write(
                f"  epoch {epoch:>5}   reconstruction {reconstruction:.4f}   rq {rq:.4f}   "
                f"colliding items with nearest codes: {curve[-1]['colliding_items']:,} of {len(codes):,}"
            )
    return model.eval().cpu(), curve


@torch.no_grad()
def cluster(embeddings: torch.Tensor, config: RQVAEConfig, seed: int) -> tuple[RQVAE, list[dict]]:
    """Fit residual k-means to embeddings float32 [items, dim]; return an RQ-VAE without encoder, and a curve of 1."""
    model = RQVAE(config).eval()
    model.fit_scale(embeddings)
    fill_codebooks(model.encode(embeddings), model.codebooks, seed, balanced=config.balanced)
    output = model(embeddings, use_sinkhorn=False)
    point = {
        "reconstruction": output.reconstruction_loss.item(),
        "colliding_items": count_collisions(output.codes.numpy()),
    }
    print(
        f"  reconstruction {point['reconstruction']:.4f}   "
        f"colliding items with nearest codes: {point['colliding_items']:,} of {len(embeddings):,}"
    )
    return model, [point]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="rqvae", help="see above (default: %(default)s)")
    parser.add_argument("--embeddings", type=Path, required=True, help=".npy from index.embed, float [items, dim]")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the RQ-VAE (config + safetensors)")
    parser.add_argument(
        "--codebook_sizes", type=int, nargs="+",
        help="codes of each level (default: 32 32 64 for up to 5,000 items, LC-Rec's 256 256 256 256 for more)",
    )  # fmt: skip
    parser.add_argument("--code_dim", type=int, default=32, help="width of a code (default: %(default)s)")
    parser.add_argument(
        "--hidden_sizes", type=int, nargs="+", default=[256, 128, 64],
        help="hidden widths of the encoder; LC-Rec uses 2048 1024 512 256 128 64 for embeddings of width 4096 "
        "(default: 256 128 64)",
    )  # fmt: skip
    parser.add_argument(
        "--sinkhorn_epsilon", type=float,
        help="Sinkhorn regularization on the last level, in training and for colliding items; 0: no Sinkhorn "
        "(default: 0.003; k-means: 0)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=400, help="training epochs (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1024, help="items per step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    parser.add_argument("--weight_decay", type=float, default=1e-4, help="of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an RQ-VAE of other embeddings or settings")
    args = one_line_errors(parser).parse_args()
    for flag in RQVAE_FLAGS if args.method != "rqvae" else ():
        if getattr(args, flag) != parser.get_default(flag):
            raise InputError(f"--{flag} has no effect with --method {args.method}; leave it out")
    if args.sinkhorn_epsilon is None:
        args.sinkhorn_epsilon = 0.003 if args.method == "rqvae" else 0.0
    if args.epochs < 1 or args.batch_size < 2 or min(args.code_dim, *args.hidden_sizes) < 1:
        raise InputError("--batch_size needs at least 2, --epochs, --code_dim and --hidden_sizes at least 1")
    if not args.learning_rate > 0 or not (args.sinkhorn_epsilon == 0 or args.sinkhorn_epsilon >= 0.0015):
        raise InputError(
            "--learning_rate should be above 0, --sinkhorn_epsilon 0 or at least 0.0015 (smaller values overflow)"
        )
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: should be from 0 to 2^32 - 1")
    return args


def record_settings(args: argparse.Namespace) -> dict:
    """Return what the model is made with: the SHA-256 of the embeddings, and every setting."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in ("embeddings", "output_dir", "force")}
    return {"embeddings_sha256": file_sha256(args.embeddings), **settings}


@cli_main
def main() -> None:
    args = parse_args()
    embeddings = torch.from_numpy(read_embeddings(args.embeddings))
    args.codebook_sizes = args.codebook_sizes or default_sizes(len(embeddings))
    check_sizes(args.codebook_sizes, len(embeddings))
    if (embeddings == embeddings[0]).all():
        raise InputError(f"{args.embeddings}: all {len(embeddings):,} rows are equal; embed the items again")
    if args.method != "rqvae" and len(embeddings) < max(args.codebook_sizes):
        raise InputError(
            f"{args.embeddings}: {len(embeddings):,} items, fewer than the {max(args.codebook_sizes)} codes of a "
            "level; give smaller --codebook_sizes"
        )
    made_with = record_settings(args)
    check_replaceable(args.output_dir, made_with, args.force)
    output_folder(args.output_dir)
    disable_progress_bar()
    config = RQVAEConfig(
        input_dim=embeddings.shape[1],
        hidden_sizes=args.hidden_sizes if args.method == "rqvae" else None,
        code_dim=args.code_dim,
        codebook_sizes=args.codebook_sizes,
        sinkhorn_epsilon=args.sinkhorn_epsilon,
        balanced=args.method == "balanced-kmeans",
    )
    started = time.monotonic()
    if args.method == "rqvae":
        model, curve = train(embeddings, config, args)
    else:
        model, curve = cluster(embeddings, config, args.seed)
    run = {"embeddings": str(args.embeddings.absolute()), **run_metadata(vars(args), started), "curve": curve}
    with atomic_folder(args.output_dir, replaces=True) as folder:
        model.save_pretrained(folder)
        write_record(folder, made_with, run)
    print(f"{args.method} of {sum(p.numel() for p in model.parameters()):,} parameters -> {args.output_dir}/")


if __name__ == "__main__":
    main()
