"""Benchmark semantic IDs: quality of each strategy, and the effect of Sinkhorn among colliding items.

bash run.sh; bash run.sh Industrial --data_path ~/datasets       # or their stages up to `embed`
python -m bench.index data/ml-100k ~/datasets/Industrial --seeds 42 1

Embeddings are those of run.sh, data/<dataset>/<dataset>.emb-minilm-td.npy. Every index is made with the defaults of
index.train and several seeds. Seconds exclude the start of Python.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from bench.common import write_results
from index.codes import default_sizes, random_codes, to_tokens
from index.collisions import count_collisions, reassign_by_sinkhorn, resolve_collisions
from index.generate import assign_codes
from index.kmeans import balanced_codes
from index.report import read_categories
from index.rqvae import RQVAE
from reclingua.datasets.interactions import open_interactions, read_embeddings
from reclingua.metrics.index import index_statistics, perplexity
from reclingua.utils.errors import InputError, cli_main, one_line_errors

ROOT = Path(__file__).parents[1]
STRATEGIES = {  # name -> flags of index.train; None: no training
    "RQ-VAE": [],
    "RQ-VAE without Sinkhorn": ["--sinkhorn_epsilon", 0],
    "k-means": ["--method", "kmeans"],
    "balanced k-means": ["--method", "balanced-kmeans"],
    "random": None,
}


def train_rqvae(embeddings: Path, flags: list, seed: int, folder: Path) -> tuple[RQVAE, float]:
    """Train a model by index.train; return it and the seconds that training took."""
    command = [
        "-m",
        "index.train",
        "--embeddings",
        embeddings.absolute(),
        "--output_dir",
        folder,
        "--seed",
        seed,
        *flags,
    ]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    seconds = json.loads((folder / "run.json").read_text())["seconds"]
    return RQVAE.from_pretrained(folder).eval().requires_grad_(False), seconds


def compare_repairs(model: RQVAE, latents: torch.Tensor, nearest: np.ndarray) -> dict[str, dict]:
    """Return figures of colliding items: nearest codes, then moved with and without Sinkhorn first.

    `error` is the mean squared distance of an item to its quantised vector, relative to that to the mean item.
    """
    books = [book.numpy() for book in model.codebooks]
    points = latents.numpy()
    model.config.sinkhorn_epsilon = 0.003  # for models without it, too
    reassigned = reassign_by_sinkhorn(model, latents, nearest)
    figures = {}
    for name, before, codes in (
        ("nearest codes, colliding", nearest, nearest),
        ("moved", nearest, resolve_collisions(model, latents, nearest)),
        ("Sinkhorn, then moved", reassigned, resolve_collisions(model, latents, reassigned)),
    ):
        quantised = sum(book[codes[:, level]] for level, book in enumerate(books))
        changed = (codes != nearest).any(1)
        figures[name] = {
            "colliding_before_moving": count_collisions(before),
            "items_changed": int(changed.sum()),
            "changed_above_last_level": int((codes != nearest)[:, :-1].any(1).sum()),
            "error": float(((points - quantised) ** 2).sum() / ((points - points.mean(0)) ** 2).sum()),
            "perplexity_last_level": perplexity(codes[:, -1]),
        }
    return figures


def measure_dataset(folder: Path, seeds: list[int], scratch: Path) -> dict:
    """Return figures of every strategy on the dataset in `folder`: strategy -> a list with one entry per seed."""
    name = folder.name
    path = Path("data") / name / f"{name}.emb-minilm-td.npy"
    key, categories = read_categories(folder / f"{name}.item.json", None)
    ids = open_interactions(folder.parent, name, needs=["items"]).item_ids
    embeddings = torch.from_numpy(read_embeddings(path, rows=len(ids)))
    runs: dict[str, list[dict]] = {strategy: [] for strategy in STRATEGIES}
    for seed in seeds:
        for strategy, flags in STRATEGIES.items():
            run: dict = {"seed": seed}
            if flags is None:
                started = time.monotonic()
                codes = random_codes(default_sizes(len(ids)), len(ids), seed)
                run["seconds"] = time.monotonic() - started
            else:
                model, run["seconds"] = train_rqvae(path, flags, seed, scratch / f"{name}-{strategy}-{seed}")
                started = time.monotonic()
                with contextlib.redirect_stdout(io.StringIO()):
                    codes = assign_codes(model, embeddings)
                run["seconds"] += time.monotonic() - started
                latents = model.encode(embeddings)
                nearest = model.quantize(latents, use_sinkhorn=False)[1].numpy()
                first = balanced_codes(latents, model.codebooks) if model.config.balanced else nearest
                run["colliding_before"] = count_collisions(first)
                if not model.config.balanced:
                    run["repair"] = compare_repairs(model, latents, nearest)
            run |= index_statistics(dict(zip(ids, to_tokens(codes), strict=True)), categories)
            for prefix in run["prefixes"]:
                prefix["largest"] = prefix["largest"][:1]
            runs[strategy].append(run)
            print(f"{name}   seed {seed}   {strategy:<24}{run['seconds']:>7.1f} s", flush=True)
    return {"category_key": key, "runs": runs}


def mean(rows: list[dict], *path: str | int) -> float:
    """Return the mean over seeds of one figure, given by its keys."""
    values = []
    for row in rows:
        for key in path:
            row = row[key]
        values.append(row)
    return statistics.mean(values)


def print_tables(name: str, figures: dict) -> None:
    print(f"\n{name}: mean over the seeds\n")
    print(
        "| | seconds | colliding at first | codes used | perplexity | largest group: 1, 2 codes | lift: 1, 2 codes |"
    )
    print("|---|---|---|---|---|---|---|")
    for strategy, rows in figures["runs"].items():
        levels = range(len(rows[0]["levels"]))
        cells = [f"{mean(rows, 'seconds'):.1f}"]
        cells += [f"{mean(rows, 'colliding_before'):,.0f}" if "colliding_before" in rows[0] else ""]
        cells += [" ".join(f"{mean(rows, 'levels', level, 'codes_used'):.0f}" for level in levels)]
        cells += [" ".join(f"{mean(rows, 'levels', level, 'perplexity'):.1f}" for level in levels)]
        cells += [", ".join(f"{mean(rows, 'prefixes', length, 'largest', 0, 'items'):.0f}" for length in (0, 1))]
        cells += [", ".join(f"{mean(rows, 'prefixes', length, 'lift'):.2f}" for length in (0, 1))]
        print(f"| {strategy} | {' | '.join(cells)} |")
    print("\n| | colliding before moving | items changed | above the last level | error | perplexity, last level |")
    print("|---|---|---|---|---|---|")
    for strategy, rows in figures["runs"].items():
        for step in rows[0].get("repair", ()):
            means = {key: mean(rows, "repair", step, key) for key in rows[0]["repair"][step]}
            cells = [f"{means[key]:,.0f}" for key in list(means)[:3]]
            cells += [f"{means['error']:.4f}", f"{means['perplexity_last_level']:.1f}"]
            print(f"| {strategy}: {step} | {' | '.join(cells)} |")


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="dataset folders with item texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="(default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        datasets = {folder.name: measure_dataset(folder, args.seeds, Path(scratch)) for folder in args.folders}
    for name, figures in datasets.items():
        print_tables(name, figures)
    print(write_results("index", torch.device("cpu"), {"datasets": datasets}))


if __name__ == "__main__":
    main()
