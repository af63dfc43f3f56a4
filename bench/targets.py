"""Benchmark quality at equal wall time: one sample per prefix of a history (LC-Rec's) against whole histories.

bash run.sh Industrial --data_path ~/datasets       # or its stages up to `index`
python -m bench.targets --data_path ~/datasets --dataset Industrial --seconds 240 --seeds 1 2 3

Both sides run at the same time, each on half of the cores, so that they share the load of the machine. A short run of
each finds how many updates fit into the time. Learning rate, dropout and tokens per batch are those of the preset.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.common import write_results
from reclingua.datasets.tasks import TARGETS
from reclingua.utils.errors import InputError, cli_main, one_line_errors

ROOT = Path(__file__).parents[1]
METRICS = ("hit@10", "ndcg@10")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=Path("../shared/data"), help="(default: %(default)s)")
    parser.add_argument("--dataset", default="Industrial", help="dataset with item texts (default: %(default)s)")
    parser.add_argument(
        "--index_file", type=Path, help="(default: data/<dataset>/<dataset>.index.json, made by run.sh)"
    )
    parser.add_argument("--config", help="preset (default: config/lcrec-<dataset>-cpu.yaml)")
    parser.add_argument("--seconds", type=float, default=240, help="training seconds per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: %(default)s)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    config = args.config or f"config/lcrec-{args.dataset}-cpu.yaml"
    data = ("--dataset", args.dataset, "--data_path", args.data_path)
    index = ("--index_file", args.index_file or Path("data") / args.dataset / f"{args.dataset}.index.json")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        run_side_by_side(["-m", "convert.scratch", *data, "--output_dir", base])

        def tune(name: str, updates: dict[str, int], seed: int, evaluations: int) -> dict[str, dict]:
            """Tune with both targets at the same time; return run.json of each."""
            same = ("finetune.py", "--config", config, *data, *index, "--base_model", base, "--seed", seed)
            same += ("--save_and_eval_strategy", "steps" if evaluations else "no")
            outputs = {target: Path(folder) / f"{name}-{target}" for target in TARGETS}
            run_side_by_side(
                *(
                    [*same, "--targets", target, "--output_dir", outputs[target], "--max_steps", updates[target]]
                    + ["--save_steps", updates[target] // max(1, evaluations)]
                    for target in TARGETS
                )
            )
            return {target: json.loads((output / "run.json").read_text()) for target, output in outputs.items()}

        def updates_in(trial: dict[str, dict], updates: dict[str, int], seconds: float) -> dict[str, int]:
            """Return the updates that fit into `seconds` at the speed of the trial, a multiple of six checkpoints."""
            return {
                target: max(6, 6 * round(updates[target] * seconds / run["throughput"]["seconds"] / 6))
                for target, run in trial.items()
            }

        updates = dict.fromkeys(TARGETS, 60)
        updates = updates_in(tune("first", updates, 0, evaluations=0), updates, 20)
        # A second trial, in which both end at about the same time: a side alone on the machine is faster.
        updates = updates_in(tune("second", updates, 0, evaluations=0), updates, args.seconds)
        runs: dict[str, list[dict]] = {target: [] for target in TARGETS}
        for seed in args.seeds:
            tuned = tune(f"seed{seed}", updates, seed, evaluations=6)
            results = {target: Path(folder) / f"seed{seed}-{target}.json" for target in TARGETS}
            same = ("test.py", *data, *index, "--num_beams", 20, "--exclude_seen", "--metrics", ",".join(METRICS))
            run_side_by_side(
                *(
                    [*same, "--ckpt_path", Path(folder) / f"seed{seed}-{target}", "--results_file", results[target]]
                    for target in TARGETS
                )
            )
            for target, run in tuned.items():
                metrics = json.loads(results[target].read_text())["mean_results"]
                runs[target].append({"seed": seed, "updates": updates[target], **run["throughput"], **metrics})
                text = "   ".join(f"{metric} {metrics[metric]:.4f}" for metric in METRICS)
                print(f"seed {seed}   {target:<8}{run['throughput']['seconds']:>6.0f} s   {text}", flush=True)
    summary = {
        target: {name: spread([run[name] for run in rows]) for name in METRICS} for target, rows in runs.items()
    }
    for target, spreads in summary.items():
        texts = (f"{name} {s['mean']:.4f} ({s['low']:.4f} to {s['high']:.4f})" for name, s in spreads.items())
        print(f"{target:<8}", "   ".join(texts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_results("targets", device, {"arguments": vars(args), "summary": summary, "runs": runs}))


def run_side_by_side(*commands: list) -> None:
    """Run Python commands at the same time, each on its own share of the cores; InputError if one fails."""
    cores, processes = sorted(os.sched_getaffinity(0)), []
    for number, command in enumerate(commands):
        share = cores[number :: len(commands)] or cores
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(len(share))},
                stdout=subprocess.DEVNULL,
                preexec_fn=partial(os.sched_setaffinity, 0, share),
            )
        )
    for process in processes:
        if process.wait():
            for other in processes:
                other.terminate()
            raise InputError(f"{' '.join(process.args)} failed")


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
