"""Train an RQ-VAE on item embeddings.

python -m index.train --embeddings data/ml-100k/ml-100k.emb-minilm-td.npy --output_dir ckpt/ml-100k/rqvae
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from data.dataset import output_folder, read_embeddings, write_json
from errors import InputError, exits_cleanly, one_line
from facts import run_facts
from index.collisions import colliding
from index.rqvae import RQVAE, RQVAEConfig


def train(embeddings: torch.Tensor, config: RQVAEConfig, args: argparse.Namespace) -> tuple[RQVAE, list[dict]]:
    """An RQ-VAE fitted to embeddings float32 [items, dim], and its learning curve."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings = embeddings.to(device)
    model = RQVAE(config).to(device)
    model.fit_scale(embeddings)
    batch = min(args.batch_size, len(embeddings))
    model.init_codebooks(embeddings[torch.randperm(len(embeddings), device=device)[:batch]], args.seed)

    steps = args.epochs * -(-len(embeddings) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    curve, report_every = [], max(1, args.epochs // 10)
    for epoch in tqdm(range(1, args.epochs + 1), desc="rq-vae", unit="epoch", disable=None):
        total = np.zeros(2)
        for rows in torch.randperm(len(embeddings), device=device).split(batch):
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
                codes = model(embeddings, balanced=False).codes.cpu().numpy()
            curve.append(
                {"epoch": epoch, "reconstruction": reconstruction, "rq": rq, "colliding_items": colliding(codes)}
            )
            tqdm.write(
                f"  epoch {epoch:>5}   reconstruction {reconstruction:.4f}   rq {rq:.4f}   "
                f"colliding items, nearest codes: {curve[-1]['colliding_items']:,} of {len(codes):,}"
            )
    return model.eval().cpu(), curve


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, required=True, help=".npy from index.embed, float [items, dim]")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the RQ-VAE (config + safetensors)")
    parser.add_argument(
        "--codebook_sizes", type=int, nargs="+",
        help="codes of each level (default: 32 32 64 for up to 5,000 items, LC-Rec's 256 256 256 256 for more)",
    )  # fmt: skip
    parser.add_argument("--code_dim", type=int, default=32, help="width of a code (default: %(default)s)")
    parser.add_argument(
        "--hidden_sizes", type=int, nargs="+", default=[256, 128, 64],
        help="hidden widths of the encoder; LC-Rec's 2048 1024 512 256 128 64 is for 4096-wide embeddings "
        "(default: 256 128 64)",
    )  # fmt: skip
    parser.add_argument("--sinkhorn_epsilon", type=float, default=0.003, help="0: no Sinkhorn (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    parser.add_argument("--weight_decay", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    args = one_line(parser).parse_args()

    embeddings = torch.from_numpy(read_embeddings(args.embeddings))
    args.codebook_sizes = args.codebook_sizes or ([32, 32, 64] if len(embeddings) <= 5_000 else [256] * 4)
    if any(size < 2 for size in args.codebook_sizes) or args.epochs < 1 or args.batch_size < 2 or args.code_dim < 1:
        raise InputError("--codebook_sizes and --batch_size need at least 2, --epochs and --code_dim at least 1")
    if args.learning_rate <= 0 or args.sinkhorn_epsilon != 0 and args.sinkhorn_epsilon < 0.0015:
        raise InputError(
            "--learning_rate should be above 0, --sinkhorn_epsilon 0 or at least 0.0015 (below, it overflows)"
        )
    output_folder(args.output_dir)
    disable_progress_bar()
    config = RQVAEConfig(
        input_dim=embeddings.shape[1],
        hidden_sizes=args.hidden_sizes,
        code_dim=args.code_dim,
        codebook_sizes=args.codebook_sizes,
        sinkhorn_epsilon=args.sinkhorn_epsilon,
    )
    started = time.monotonic()
    model, curve = train(embeddings, config, args)
    model.save_pretrained(args.output_dir)
    write_json(args.output_dir / "run.json", {**run_facts(vars(args), started), "curve": curve}, indent=1)
    print(f"RQ-VAE of {sum(p.numel() for p in model.parameters()):,} parameters -> {args.output_dir}/")


if __name__ == "__main__":
    main()
