"""Quality at equal wall time: one sample per prefix of a history (`next`, LC-Rec's) against whole histories.

bash run.sh Industrial --data_path ../shared/data       # or its stages up to `index`
python -m bench.supervise --data_path ../shared/data --dataset Industrial --seconds 240 --seeds 1 2 3

Both run at the same time, each on half of the cores, so that they get the same machine. A short run of each tells how
many updates fit into the time given. Learning rate, dropout and tokens per batch are the preset's for both.
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
    parser.add_argument("--dataset", default="Industrial", help="with item texts (default: %(default)s)")
    parser.add_argument("--index_file", type=Path, help="(default: data/<dataset>/<dataset>.index.json, run.sh's)")
    parser.add_argument("--config", help="preset (default: config/lcrec-<dataset>-cpu.yaml)")
    parser.add_argument("--seconds", type=float, default=240, help="of training for each run (default: %(default)s)")
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
        paired_chunks(["-m", "models.scratch", *data, "--output_dir", base])

        def tune(name: str, updates: dict[str, int], seed: int, evaluations: int) -> dict[str, dict]:
            """run.json of both ways, tuned at the same time."""
            same = ("finetune.py", "--config", config, *data, *index, "--base_model", base, "--seed", seed)
            same += ("--save_and_eval_strategy", "steps" if evaluations else "no")
            outputs = {way: Path(folder) / f"{name}-{way}" for way in TARGETS}
            paired_chunks(
                *(
                    [*same, "--supervise", way, "--output_dir", outputs[way], "--max_steps", updates[way]]
                    + ["--save_steps", updates[way] // max(1, evaluations)]
                    for way in TARGETS
                )
            )
            return {way: json.loads((output / "run.json").read_text()) for way, output in outputs.items()}

        def fitting(trial: dict[str, dict], updates: dict[str, int], seconds: float) -> dict[str, int]:
            """Updates for that time at the speed of a trial, a multiple of six, as of six checkpoints one is kept."""
            return {
                way: max(6, 6 * round(updates[way] * seconds / run["throughput"]["seconds"] / 6))
                for way, run in trial.items()
            }

        updates = dict.fromkeys(TARGETS, 60)
        updates = fitting(tune("first", updates, 0, evaluations=0), updates, 20)
        # Once more, now that both end at about the same time: alone on the machine either is faster.
        updates = fitting(tune("second", updates, 0, evaluations=0), updates, args.seconds)
        runs: dict[str, list[dict]] = {way: [] for way in TARGETS}
        for seed in args.seeds:
            tuned = tune(f"seed{seed}", updates, seed, evaluations=6)
            results = {way: Path(folder) / f"seed{seed}-{way}.json" for way in TARGETS}
            same = ("test.py", *data, *index, "--num_beams", 20, "--exclude_seen", "--metrics", ",".join(METRICS))
            paired_chunks(
                *(
                    [*same, "--ckpt_path", Path(folder) / f"seed{seed}-{way}", "--results_file", results[way]]
                    for way in TARGETS
                )
            )
            for way, run in tuned.items():
                found = json.loads(results[way].read_text())["mean_results"]
                runs[way].append({"seed": seed, "updates": updates[way], **run["throughput"], **found})
                said = "   ".join(f"{metric} {found[metric]:.4f}" for metric in METRICS)
                print(f"seed {seed}   {way:<8}{run['throughput']['seconds']:>6.0f} s   {said}", flush=True)
    summary = {way: {name: spread([run[name] for run in rows]) for name in METRICS} for way, rows in runs.items()}
    for way, metrics in summary.items():
        said = (f"{name} {s['mean']:.4f} ({s['low']:.4f} to {s['high']:.4f})" for name, s in metrics.items())
        print(f"{way:<8}", "   ".join(said))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_results("supervise", device, {"arguments": vars(args), "summary": summary, "runs": runs}))


def paired_chunks(*commands: list) -> None:
    """Run Python commands at the same time, each on its own share of the cores, to their end."""
    cores, processes = sorted(os.sched_getaffinity(0)), []
    for at, command in enumerate(commands):
        share = cores[at :: len(commands)] or cores
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
