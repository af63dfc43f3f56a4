"""Benchmark collaborative models: AUC and UAUC next to published ones, time of training and of the metric.

python -m bench.collaborative --data_path ~/datasets
python -m bench.collaborative --data_path ~/datasets --models mf hash --seeds 1 2 3 4 5

MF is timed against a plain PyTorch loop: `nn.Embedding`, Adam, one shuffled tensor indexed batch by batch, valid AUC
by scikit-learn after each epoch. Both train the same number of epochs in turns, then each to its best epoch on valid.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.common import write_results
from pretrain import DEFAULTS, Settings, build, flushed_denormals, train
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.inference.collaborative import auc_metrics, model_inputs, score
from reclingua.metrics import load_metric
from reclingua.metrics.roc import uauc
from reclingua.models.collaborative import COLLABORATIVE_MODELS
from reclingua.models.collaborative.base import CollaborativeConfig
from reclingua.utils.errors import cli_main, one_line_errors

PUBLISHED = {  # AUC, UAUC on ml-1m (CoLLM, table 2); the hashed model is compared with MF
    "mf": (0.6482, 0.6361),
    "lightgcn": (0.5959, 0.6499),
    "sasrec": (0.7078, 0.6884),
    "din": (0.7166, 0.6459),
}
PAPER_SETTINGS = Settings(learning_rate=1e-3, weight_decay=1e-4, embedding_size=256)  # for MF


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=Path("../shared/data"), help="(default: %(default)s)")
    parser.add_argument("--dataset", default="ml-1m", help="(default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", choices=COLLABORATIVE_MODELS, default=list(COLLABORATIVE_MODELS), help="(default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each timing (default: %(default)s)")
    parser.add_argument(
        "--plain_epochs",
        type=int,
        default=320,
        help="epochs of the plain loop when it trains to its best (default: 320)",
    )
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    dataset = open_ratings(args.data_path, args.dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = time_uauc(args.repeats) | time_mf(dataset, args)
    figures["models"] = {kind: test_quality(dataset, kind, args.seeds) for kind in args.models}
    print(f"\n{'':<10}{'AUC':>8}{'+-':>7}{'published':>11}{'UAUC':>8}{'+-':>7}{'published':>11}{'s a seed':>10}")
    for kind, result in figures["models"].items():
        published = [f"{value:.4f}" for value in PUBLISHED.get(kind, ())] or ["-", "-"]
        print(
            f"{kind:<10}{result['auc']:>8.4f}{result['std']['auc']:>7.4f}{published[0]:>11}"
            f"{result['uauc']:>8.4f}{result['std']['uauc']:>7.4f}{published[1]:>11}{result['seconds']:>10.0f}"
        )
    print(f"\nresults in {write_results('collaborative', device, figures)}")


def time_uauc(repeats: int) -> dict:
    """Time UAUC of one million scores of 100,000 users, by the function and by its `evaluate` module."""
    generator = np.random.default_rng(0)
    users, labels = generator.integers(0, 100_000, 1_000_000), generator.integers(0, 2, 1_000_000)
    scores = generator.normal(size=1_000_000)
    module = load_metric("uauc")
    seconds = {
        "uauc_1m_seconds": median_time(lambda: uauc(users, labels, scores), repeats),
        "uauc_1m_evaluate_seconds": median_time(
            lambda: module.compute(prediction_scores=scores, references=labels, users=users), 1
        ),
    }
    print("UAUC of 1,000,000 scores: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    return seconds


def median_time(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def time_mf(dataset: RatingsDataset, args: argparse.Namespace) -> dict:
    """Time both loops for the same epochs in turns, then each to its best epoch."""
    sides = {"plain": lambda n: plain_mf(dataset, n), "ours": lambda n: our_mf(dataset, n, PAPER_SETTINGS)}
    for side in sides.values():
        side(2)  # warm-up
    epoch_seconds = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            epoch_seconds[name].append(side(args.epochs)[-1]["seconds"] / args.epochs)
    medians = {name: statistics.median(times) for name, times in epoch_seconds.items()}

    to_best = {
        "plain": plain_mf(dataset, args.plain_epochs),
        "plain, begun as ours": plain_mf(dataset, 60, std=CollaborativeConfig.initializer_range),
        "ours": our_mf(dataset, 500, PAPER_SETTINGS),
        "ours, defaults": our_mf(dataset, 500, DEFAULTS["mf"]),
    }
    to_best = {name: max(curve, key=lambda line: line["auc"]) for name, curve in to_best.items()}
    ratio = to_best["plain"]["seconds"] / to_best["ours"]["seconds"]
    print(f"MF, 256 wide: an epoch {medians['plain'] / medians['ours']:.2f} times as fast as in the plain loop")
    for name, line in to_best.items():
        print(
            f"  {name}: best epoch {line['epoch']} after {line['seconds']:.1f} s, valid AUC {line['auc']:.4f}, "
            f"test AUC {line['test_auc']:.4f}"
        )
    return {
        "mf_ratio": ratio,
        "mf_epoch_ratio": medians["plain"] / medians["ours"],
        "mf_epoch_seconds": epoch_seconds,
        "mf_to_best": to_best,
    }


def our_mf(dataset: RatingsDataset, epochs: int, settings: Settings) -> list[dict]:
    """Return the learning curve of `pretrain.train`, each line with the test AUC of the best epoch."""
    settings = replace(settings, epochs=epochs, seed=1)
    model = build("mf", dataset, settings)
    curve = train(model, dataset, settings)
    test = dataset.parts["test"]
    test_auc = roc_auc_score(to_numpy(test, "label"), score(model, model_inputs(test, model)))
    return [line | {"test_auc": test_auc} for line in curve]


@flushed_denormals()  # as pretrain.py does
def plain_mf(dataset: RatingsDataset, epochs: int, std: float = 1.0) -> list[dict]:
    """Train by a plain loop, with initial embeddings of this `std`; return the curve of valid and test AUC."""
    torch.manual_seed(1)
    parts = {
        name: torch.from_numpy(np.stack([to_numpy(part, key) for key in ("uid", "iid", "label")], 1).astype(np.int64))
        for name, part in dataset.parts.items()
    }
    users, items = nn.Embedding(dataset.num_users, 256), nn.Embedding(dataset.num_items, 256)
    for embedding in (users, items):
        nn.init.normal_(embedding.weight, std=std)  # the default of nn.Embedding is 1
    optimizer = torch.optim.Adam(
        [*users.parameters(), *items.parameters()],
        lr=PAPER_SETTINGS.learning_rate,
        weight_decay=PAPER_SETTINGS.weight_decay,
    )
    curve, testing, began = [], 0.0, time.monotonic()
    for epoch in tqdm(range(1, epochs + 1), desc="plain loop", disable=None, leave=False):
        shuffled = parts["train"][torch.randperm(len(parts["train"]))]
        for batch in shuffled.split(1024):
            scores = (users(batch[:, 0]) * items(batch[:, 1])).sum(-1)
            loss = F.binary_cross_entropy_with_logits(scores, batch[:, 2].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def part_auc(part: torch.Tensor) -> float:
            with torch.no_grad():
                return roc_auc_score(part[:, 2], (users(part[:, 0]) * items(part[:, 1])).sum(-1))

        line = {"epoch": epoch, "auc": part_auc(parts["valid"]), "seconds": time.monotonic() - began - testing}
        before = time.monotonic()
        curve.append(line | {"test_auc": part_auc(parts["test"])})
        testing += time.monotonic() - before
    return curve


def test_quality(dataset: RatingsDataset, kind: str, seeds: list[int]) -> dict:
    """Train a kind of model with its defaults for each seed; return test metrics: mean, std and each seed's."""
    runs, seconds = [], []
    for seed in seeds:
        began = time.monotonic()
        settings = replace(DEFAULTS[kind], seed=seed)
        model = build(kind, dataset, settings)
        train(model, dataset, settings)
        seconds.append(time.monotonic() - began)
        test = dataset.parts["test"]
        runs.append(auc_metrics(test, score(model, model_inputs(test, model))))
    values = {name: [run["test"][name] for run in runs] for name in ("auc", "uauc")}
    result: dict = {name: statistics.mean(seed_values) for name, seed_values in values.items()}
    result["std"] = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
    for part in ("warm", "cold"):
        result[part] = {name: statistics.mean(run[part][name] for run in runs) for name in values}
    print(f"{kind}: " + "; ".join(f"{a:.4f}/{u:.4f}" for a, u in zip(values["auc"], values["uauc"], strict=True)))
    return result | {"seeds": seeds, "runs": runs, "seconds": statistics.mean(seconds)}


if __name__ == "__main__":
    main()
