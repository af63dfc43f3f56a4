"""Benchmark baselines, and models fused with them: what there is to beat on each dataset, and what a model adds.

bash run.sh                                                                       # makes data/ml-100k
python -m bench.baselines --parts next_item ratings scale --data_path ~/datasets
python -m bench.baselines --parts fusion --ckpt_path ckpt/ml-100k/lcrec           # or several seeds' checkpoints
python -m bench.baselines --parts rating_fusion --ckpt_path ckpt/ml-1m/mf --data_path ~/datasets

Every figure is of test.py on all test users or ratings; settings and weights are chosen on valid. `scale` measures the
time and the memory of EASE with 10,000 items.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.common import Peak, earlier_figures, write_results
from reclingua.baselines.ease import EASE
from reclingua.baselines.fusion import STRONGEST
from reclingua.baselines.histories import Histories
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import read_json

ROOT = Path(__file__).parents[1]
PARTS = ("next_item", "ratings", "fusion", "rating_fusion", "scale")
METRICS = ("hit@10", "ndcg@10")
# Dataset -> whether seen items are excluded: users of Instruments take items again.
EXCLUDES_SEEN = {"ml-100k": True, "Industrial": True, "Instruments": False}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["next_item", "ratings", "scale"], choices=PARTS, help="(default: %(default)s)"
    )
    parser.add_argument("--data_path", type=Path, default=Path("../shared/data"), help="(default: %(default)s)")
    parser.add_argument("--ckpt_path", type=Path, nargs="+", default=[], help="models to fuse, seeds of one training")
    parser.add_argument("--fuse", default=",".join(STRONGEST), help="of --parts fusion (default: %(default)s)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    device = torch.device("cpu")
    figures = earlier_figures("baselines", device)
    datasets = figures.setdefault("datasets", {})
    if "next_item" in args.parts:
        for name, excludes_seen in EXCLUDES_SEEN.items():
            content = measure(args, "--baselines_only", "--dataset", name, *(["--exclude_seen"] * excludes_seen))
            datasets.setdefault(name, {"excludes_seen": excludes_seen}).update(content["next_item"]["baselines"])
            datasets[name]["settings"] = content["next_item"]["baseline_settings"] | content["next_item"]["fusions"]
            datasets[name]["seconds"] = content["seconds"]
    if "ratings" in args.parts:
        for count in ([], ["--count_valid"]):
            content = measure(args, "--baselines_only", "--dataset", "ml-1m", *count)
            rows = content["ratings"]["baselines"]
            suffix = ", counted on train and valid" if count else ""
            datasets.setdefault("ml-1m", {}).update(
                {f"{name}{suffix}": {key: row["test"][key] for key in ("auc", "uauc")} for name, row in rows.items()}
            )
    if "fusion" in args.parts:
        fuse(args, datasets, METRICS, "mean_results")
    if "rating_fusion" in args.parts:
        fuse(args, datasets, ("auc", "uauc"), "test")
    if "scale" in args.parts:
        figures["scale"] = measure_ease()
    for name, rows in datasets.items():
        print(name)
        for row, values in rows.items():
            if isinstance(values, dict) and row != "settings":
                shown = [f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)]
                print(f"  {row:<50}{'   '.join(shown)}")
    print(write_results("baselines", device, figures))


def measure(args: argparse.Namespace, *flags: object) -> dict:
    """Run test.py and return its results; a dataset that --data_path does not have is taken from data/."""
    name = flags[flags.index("--dataset") + 1]
    data_path = args.data_path if (args.data_path / str(name)).is_dir() else Path("data")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = ["test.py", "--data_path", data_path, "--results_file", results, *flags]
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{' '.join(map(str, command))} failed: {done.stderr[-500:]}")
        return json.loads(results.read_text())


def fuse(args: argparse.Namespace, datasets: dict, metrics: tuple[str, ...], key: str) -> None:
    """Measure models alone and fused, and the fusion of the baselines alone; means over the checkpoints."""
    runs: dict[str, list[dict]] = {}
    if not args.ckpt_path:
        raise InputError("--parts fusion: name models of finetune.py or pretrain.py by --ckpt_path")
    for folder in args.ckpt_path:
        metadata, run = (read_json(folder / file, "a tuned model") for file in ("reclingua.json", "run.json"))
        name, is_next_item = metadata["dataset"], key == "mean_results"
        flags = ["--exclude_seen"] if is_next_item and EXCLUDES_SEEN.get(name, True) else []
        fused = args.fuse if is_next_item else "like-rates"
        content = measure(args, "--ckpt_path", folder.resolve(), "--dataset", name, "--fuse", fused, *flags)
        rows = {metadata["method"]: content[key]} | {
            row: values if is_next_item else values[key]
            for part in ("baselines", "fused")
            for row, values in content[part].items()
        }
        seed = run.get("seed", run.get("arguments", {}).get("seed"))
        for row, values in rows.items():
            runs.setdefault(row, []).append({"seed": seed} | {metric: values[metric] for metric in metrics})
    for row, seeds in runs.items():
        means = {metric: statistics.mean(values[metric] for values in seeds) for metric in metrics}
        datasets.setdefault(name, {})[row] = means | {"seeds": seeds}


def measure_ease(users: int = 50_000, items: int = 10_000, length: int = 20) -> dict:
    """Return seconds and memory of one fit of EASE on random histories, and of the scores of 1,000 users."""
    draw = np.random.default_rng(0)
    popularity = 1 / np.arange(10, items + 10)
    drawn = draw.choice(items, users * length, p=popularity / popularity.sum())
    histories = Histories(drawn, np.full(users, length), items)
    with Peak(torch.device("cpu")) as peak:
        began = time.monotonic()
        model = EASE().fit(histories)
        fitted = time.monotonic()
        model.scores(histories[:1000])
        scored = time.monotonic()
    figures = {"items": items, "users": users, "fit_seconds": fitted - began, "score_seconds": scored - fitted}
    print(f"EASE, {items:,} items: {fitted - began:.1f} s, {peak.mb:,.0f} MB at most ({peak.before:,.0f} MB before)")
    return figures | {"mb": peak.mb, "mb_before": peak.before}


if __name__ == "__main__":
    main()
