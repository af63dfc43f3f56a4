"""What indices of different making are like, and what Sinkhorn among colliding items is worth.

bash run.sh; bash run.sh Industrial --data_path ../shared/data       # or their stages up to `embed`
python -m bench.index data/ml-100k ../shared/data/Industrial --seeds 42 1

Embeddings are run.sh's, data/<dataset>/<dataset>.emb-minilm-td.npy. Every index is made with index.train's defaults
and several seeds. Seconds are those of the work itself, without the start of Python.
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
from reclingua.datasets.interactions import open_dataset, read_embeddings
from reclingua.metrics.index import index_statistics, perplexity
from reclingua.utils.errors import InputError, cli_main, one_line_errors

ROOT = Path(__file__).parents[1]
WAYS = {  # name -> flags of index.train; None: no training
    "RQ-VAE": [],
    "RQ-VAE without Sinkhorn": ["--sinkhorn_epsilon", 0],
    "k-means": ["--method", "kmeans"],
    "balanced k-means": ["--method", "balanced-kmeans"],
    "random": None,
}


def trained(embeddings: Path, flags: list, seed: int, folder: Path) -> tuple[RQVAE, float]:
    """A model of index.train, and the seconds it took."""
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


def repair(model: RQVAE, latents: torch.Tensor, nearest: np.ndarray) -> dict[str, dict]:
    """What becomes of colliding items with nearest codes, with and without Sinkhorn before they are moved.

    `error` is the mean squared distance of an item to its index, as a share of that to the mean item.
    """
    books = [book.numpy() for book in model.codebooks]
    points = latents.numpy()
    model.config.sinkhorn_epsilon = 0.003  # for models without it, too
    spread_out = reassign_by_sinkhorn(model, latents, nearest)
    figures = {}
    for name, before, codes in (
        ("nearest codes, colliding", nearest, nearest),
        ("moved", nearest, resolve_collisions(model, latents, nearest)),
        ("Sinkhorn, then moved", spread_out, resolve_collisions(model, latents, spread_out)),
    ):
        places = sum(book[codes[:, level]] for level, book in enumerate(books))
        changed = (codes != nearest).any(1)
        figures[name] = {
            "colliding_before_moving": count_collisions(before),
            "items_changed": int(changed.sum()),
            "changed_above_last_level": int((codes != nearest)[:, :-1].any(1).sum()),
            "error": float(((points - places) ** 2).sum() / ((points - points.mean(0)) ** 2).sum()),
            "perplexity_last_level": perplexity(codes[:, -1]),
        }
    return figures


def look_at(folder: Path, seeds: list[int], scratch: Path) -> dict:
    """BootstrapMetrics of every way on the dataset in `folder`: way -> a list with one entry a seed."""
    name = folder.name
    path = Path("data") / name / f"{name}.emb-minilm-td.npy"
    key, categories = read_categories(folder / f"{name}.item.json", None)
    ids = open_dataset(folder.parent, name, needs=["items"]).item_ids
    embeddings = torch.from_numpy(read_embeddings(path, rows=len(ids)))
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in seeds:
        for way, flags in WAYS.items():
            run: dict = {"seed": seed}
            if flags is None:
                started = time.monotonic()
                codes = random_codes(default_sizes(len(ids)), len(ids), seed)
                run["seconds"] = time.monotonic() - started
            else:
                model, run["seconds"] = trained(path, flags, seed, scratch / f"{name}-{way}-{seed}")
                started = time.monotonic()
                with contextlib.redirect_stdout(io.StringIO()):
                    codes = assign_codes(model, embeddings)
                run["seconds"] += time.monotonic() - started
                latents = model.encode(embeddings)
                nearest = model.quantize(latents, balanced=False)[1].numpy()
                first = balanced_codes(latents, model.codebooks) if model.config.balanced_assignment else nearest
                run["colliding_before"] = count_collisions(first)
                if not model.config.balanced_assignment:
                    run["repair"] = repair(model, latents, nearest)
            run |= index_statistics(dict(zip(ids, to_tokens(codes), strict=True)), categories)
            for prefix in run["prefixes"]:
                prefix["largest"] = prefix["largest"][:1]
            runs[way].append(run)
            print(f"{name}   seed {seed}   {way:<24}{run['seconds']:>7.1f} s", flush=True)
    return {"category_key": key, "runs": runs}


def mean(rows: list[dict], *path: str | int) -> float:
    """Mean over seeds of one figure, named by its keys."""
    values = []
    for row in rows:
        for key in path:
            row = row[key]
        values.append(row)
    return statistics.mean(values)


def show(name: str, figures: dict) -> None:
    print(f"\n{name}: mean of the seeds\n")
    print(
        "| | seconds | colliding at first | codes used | perplexity | largest group: 1, 2 codes | lift: 1, 2 codes |"
    )
    print("|---|---|---|---|---|---|---|")
    for way, rows in figures["runs"].items():
        levels = range(len(rows[0]["levels"]))
        cells = [f"{mean(rows, 'seconds'):.1f}"]
        cells += [f"{mean(rows, 'colliding_before'):,.0f}" if "colliding_before" in rows[0] else ""]
        cells += [" ".join(f"{mean(rows, 'levels', at, 'codes_used'):.0f}" for at in levels)]
        cells += [" ".join(f"{mean(rows, 'levels', at, 'perplexity'):.1f}" for at in levels)]
        cells += [", ".join(f"{mean(rows, 'prefixes', at, 'largest', 0, 'items'):.0f}" for at in (0, 1))]
        cells += [", ".join(f"{mean(rows, 'prefixes', at, 'lift'):.2f}" for at in (0, 1))]
        print(f"| {way} | {' | '.join(cells)} |")
    print("\n| | colliding before moving | items changed | above the last level | error | perplexity, last level |")
    print("|---|---|---|---|---|---|")
    for way, rows in figures["runs"].items():
        for step in rows[0].get("repair", ()):
            found = {figure: mean(rows, "repair", step, figure) for figure in rows[0]["repair"][step]}
            cells = [f"{found[figure]:,.0f}" for figure in list(found)[:3]]
            cells += [f"{found['error']:.4f}", f"{found['perplexity_last_level']:.1f}"]
            print(f"| {way}: {step} | {' | '.join(cells)} |")


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="dataset folders with item texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="(default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        datasets = {folder.name: look_at(folder, args.seeds, Path(scratch)) for folder in args.folders}
    for name, figures in datasets.items():
        show(name, figures)
    print(write_results("index", torch.device("cpu"), {"datasets": datasets}))


if __name__ == "__main__":
    main()
