"""Benchmark what LC-Rec's other tasks add to seqrec, and the time to build the samples of a large dataset.

bash run.sh Industrial --data_path ~/datasets       # or its stages up to `index`
python -m data.intentions --dataset Industrial --data_path ~/datasets --users 30 \\
    --output data/Industrial/Industrial.user.json
python -m bench.tasks --seeds 1 2 3
python -m bench.tasks --parts build

With a GPU: --base_model ckpt/base/SmolLM2-135M-Instruct --configs config/lcrec.yaml \\
    config/lcrec-Industrial-six.yaml
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.common import Peak, earlier_figures, remove_duplicates, write_results
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, read_prompts
from reclingua.datasets.tasks import train_samples
from reclingua.models.language import load_tokenizer
from reclingua.models.vocabulary import code_tokens, index_token_ids
from reclingua.utils.errors import InputError, cli_main, one_line_errors

ROOT = Path(__file__).parents[1]
METRICS = ("hit@10", "ndcg@10")
CANDIDATES = {"": (), ", new items": ("--exclude_seen",)}  # candidates of a test: all items, or those new to the user
PARTS = ("methods", "build")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["methods"], choices=PARTS, help="(default: %(default)s)")
    parser.add_argument("--data_path", type=Path, default=Path("../shared/data"), help="(default: %(default)s)")
    parser.add_argument("--dataset", default="Industrial", help="dataset with item texts (default: %(default)s)")
    parser.add_argument("--made", type=Path, help="folder with its index and user file (default: data/<dataset>)")
    parser.add_argument(
        "--configs", type=Path, nargs="+", help="(default: config/lcrec-<dataset>-cpu.yaml and -six-cpu.yaml)"
    )
    parser.add_argument("--base_model", help="base model of all runs (default: convert.scratch with 2,000 words)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for models, which a later run reuses (default: none)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = earlier_figures("tasks", device)
    with tempfile.TemporaryDirectory() as folder:
        if "build" in args.parts:
            figures["build"] = build_samples(args, Path(folder))
        if "methods" in args.parts:
            figures |= {
                f"{args.dataset}{candidates}": rows
                for candidates, rows in compare(args, args.work or Path(folder)).items()
            }
    print(write_results("tasks", device, figures))


def build_samples(args: argparse.Namespace, folder: Path) -> dict:
    """Measure seconds and memory from the files of Instruments to samples that a trainer can batch, twice."""
    remove_duplicates(args.data_path, "Instruments", folder)
    tokenizer = load_tokenizer(args.base_model or "ckpt/base/SmolLM2-135M-Instruct")
    tokenizer.add_tokens(code_tokens(open_interactions(folder, "Instruments", ["index"]).index))
    runs = []
    with Peak(torch.device("cpu")) as peak:
        for _ in range(2):
            began = time.monotonic()
            dataset = open_interactions(folder, "Instruments", ["index"])
            samples = train_samples(dataset, "seqrec", max_his_len=20)
            samples_end = time.monotonic()
            token_ids = index_token_ids(tokenizer, dataset.index)
            prompts = read_prompts(LCREC_PROMPT_FILE, {"seqrec": FIELDS["seqrec"]})
            InstructionDataset(samples, dataset, tokenizer, prompts, token_ids, 20, ", ").lengths(longest=True)
            runs.append({"samples": samples_end - began, "lengths": time.monotonic() - samples_end})
    for run_seconds in runs:
        print(
            f"{len(samples):,} samples built in {run_seconds['samples']:.1f} s, "
            f"their lengths in {run_seconds['lengths']:.1f} s"
        )
    print(f"memory {peak.mb:,.0f} MB at most, {peak.before:,.0f} MB before")
    return {"samples": len(samples), "runs": runs, "mb": peak.mb, "mb_before": peak.before}


def compare(args: argparse.Namespace, work: Path) -> dict:
    """Tune each preset with each seed and test it on all users, with all items and with new items as candidates."""
    made = args.made or Path("data") / args.dataset
    configs = args.configs or [Path(f"config/lcrec-{args.dataset}{suffix}-cpu.yaml") for suffix in ("", "-six")]
    data = ("--dataset", args.dataset, "--data_path", args.data_path)
    index = ("--index_file", made / f"{args.dataset}.index.json")
    base = args.base_model or work / "base"
    if not args.base_model and not (work / "base").exists():
        run("-m", "convert.scratch", *data, "--output_dir", base, "--vocab_size", 2000)
    figures: dict[str, dict] = {candidates: {} for candidates in CANDIDATES}
    for config in configs:
        runs = []
        for seed in args.seeds:
            output = work / f"{config.stem}-{seed}"
            users = ("--user_file", made / f"{args.dataset}.user.json")
            tune = ("finetune.py", "--config", config, *data, *index, *users, "--base_model", base, "--seed", seed)
            if not (output / "run.json").exists():
                run(*tune, "--output_dir", output, "--resume_from_checkpoint", "auto")
            tuned = json.loads((output / "run.json").read_text())
            runs.append({"seed": seed, "seconds": tuned["throughput"]["seconds"]})
            for candidates, flags in CANDIDATES.items():
                results = output / f"results{candidates}.json"
                test = ("test.py", "--ckpt_path", output, *data, *index, "--num_beams", 20, *flags)
                run(*test, "--metrics", ",".join(METRICS), "--results_file", results)
                content = json.loads(results.read_text())
                runs[-1][candidates] = {name: content["mean_results"][name] for name in METRICS}
                figures[candidates] |= content["baselines"]
            print(f"{config.stem}   {runs[-1]}", flush=True)
        for candidates in CANDIDATES:
            values = {name: [run[candidates][name] for run in runs] for name in METRICS}
            figures[candidates][config.stem] = {name: statistics.mean(values[name]) for name in METRICS} | {
                "seeds": [{"seed": run["seed"], "seconds": run["seconds"], **run[candidates]} for run in runs]
            }
    for candidates, rows in figures.items():
        print(f"{args.dataset}{candidates}")
        for name, metrics in rows.items():
            print(f"  {name:<28}" + "   ".join(f"{metric} {metrics[metric]:.4f}" for metric in METRICS))
    return figures


def run(*command: object) -> None:
    """Run a Python command; InputError with the end of its stderr if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(map(str, command))} failed: {done.stderr[-500:]}")


if __name__ == "__main__":
    main()
