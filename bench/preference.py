"""Benchmark Yes/No methods: scoring next to naive scoring, a CoRA step next to a LoRA step, and AUC of each method.

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m bench.preference --data_path ~/datasets --parts scoring step
python -m bench.preference --parts methods --tune_flags=--bf16 --test_flags=--bf16     # a GPU, all of train
python -m bench.preference --parts methods --test_flags "--sample_num 700" --tune_flags "--train_data_sample_num 600 \
    --epochs 1 --per_device_batch_size 8 --max_his_len 5 --save_and_eval_strategy no --patience 0"      # a CPU: hours
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset

from bench.common import earlier_figures, synchronise, write_results
from reclingua import Scorer
from reclingua.datasets.collators import pad
from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, read_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings
from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.cora import CoRA, CoRAConfig
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.lora import add_lora
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import read_json
from reclingua.utils.metadata import CheckpointMetadata

PARTS = ("scoring", "step", "methods")
HISTORY = 10  # titles, as in the papers
RANK, TARGETS = 16, ["q_proj", "k_proj", "v_proj", "o_proj"]  # of CoRA with MF
# Name -> method, collaborative model, published AUC / UAUC on this split with models of 7 billion parameters.
METHODS = {
    "text only": ("tallrec", None, ".7097 / .6818"),
    "CoLLM-MF": ("collm", "mf", ".7295 / .6875"),
    "CoLLM-SASRec": ("collm", "sasrec", ".7235 / .6990"),
    "CoLLM-DIN": ("collm", "din", ".7353 / .6923"),
    "BinLLM": ("binllm", "hash", ".7425 / .6956"),
    "CoRA-MF": ("cora", "mf", ".7361 / .6884"),
    "CoRA-SASRec": ("cora", "sasrec", ".7019 / .6517"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="parts to run; others keep their figures"
    )
    parser.add_argument("--data_path", default="../shared/data", help="folder of ml-1m (default: %(default)s)")
    parser.add_argument("--base_model", default="ckpt/base/SmolLM2-135M-Instruct", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="rows of test that are scored (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="training steps of a timing (default: %(default)s)")
    methods = parser.add_argument_group("methods")
    methods.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: %(default)s)")
    methods.add_argument("--names", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    methods.add_argument(
        "--work", type=Path, default=Path("ckpt/bench-preference"), help="folder for models; finished ones are reused"
    )
    methods.add_argument("--tune_flags", default="", help="more flags for finetune.py, besides the preset")
    methods.add_argument("--test_flags", default="", help="more flags for test.py")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_ratings(args.data_path, "ml-1m")
    figures = earlier_figures("preference", device)
    if "scoring" in args.parts:
        figures |= time_scoring(args, dataset, device)
    if "step" in args.parts:
        figures |= time_steps(args, dataset, device)
    if "methods" in args.parts:
        figures |= {"methods": compare_methods(args)}
    print(f"\n{write_results('preference', device, figures)}")


def build_samples(rows: Dataset, dataset: RatingsDataset, tokenizer) -> YesNoDataset:
    titles = {int(item): about["title"] for item, about in dataset.items.items()}
    templates = read_prompts(YES_NO_PROMPT_FILE, {"text": YES_NO_FIELDS["text"]})["text"]
    return YesNoDataset(rows, titles, tokenizer, templates[:1], HISTORY, ", ", 8192)


# ---- Scoring: shared prefixes and one logit per row, next to padded batches with all logits ----


def time_scoring(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    tokenizer = load_tokenizer(args.base_model)
    samples = build_samples(dataset.parts["test"].take(args.rows), dataset, tokenizer)
    language = load_model(args.base_model).requires_grad_(False)
    add_lora(language, 8, 16, 0.05, ["q_proj", "v_proj"])
    yes = samples.answer.yes
    model = YesNoModel(YesNoConfig(answer=yes, trained=[], saved=[]), language).eval().to(device)
    scorer = Scorer(model, dataset, CheckpointMetadata("tallrec", dataset.name, prompts={"text": []}), tokenizer)

    @torch.no_grad()
    def naive(samples: YesNoDataset) -> np.ndarray:
        scores = []
        for start in range(0, len(samples), args.batch_size):
            ids = [samples[i]["input_ids"] for i in range(start, min(start + args.batch_size, len(samples)))]
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id, left=True).to(device),
                "attention_mask": pad([[1] * len(row) for row in ids], 0, left=True).to(device),
            }
            scores.append(language(**batch, use_cache=False).logits[:, -1, yes].float().cpu())
        return torch.cat(scores).numpy()

    sides = {
        "padded to the longest, all logits": naive,
        "ours": lambda samples: scorer.score_samples(samples, args.batch_size),
    }
    for score in sides.values():
        score(build_samples(dataset.parts["test"].take(8), dataset, tokenizer))  # warm-up: threads start
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    scores = {}
    for _ in range(args.repeats):
        for side, score in sides.items():
            seconds[side].append(
                time_call(lambda score=score, side=side: scores.update({side: score(samples)}), device)
            )
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    first, ours = sides
    print(f"\nscoring {args.rows} rows, {samples.lengths().mean():.0f} tokens each, batches of {args.batch_size}")
    for side, median in medians.items():
        difference = np.abs(scores[side] - scores[first]).max()
        print(
            f"{side:<36}{args.rows / median:>8.2f} rows/s{medians[first] / median:>8.2f} x   "
            f"difference {difference:.0e}"
        )
    return {
        "ratio_vs_naive": medians[first] / medians[ours],
        "scoring": {
            "rows": args.rows,
            "batch_size": args.batch_size,
            "tokens": float(samples.lengths().mean()),
            "seconds": seconds,
            "largest_difference": float(np.abs(scores[ours] - scores[first]).max()),
        },
    }


# ---- Training: a step of CoRA next to one of LoRA ----


def time_steps(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    tokenizer = load_tokenizer(args.base_model)
    rows = dataset.parts["train"].shuffle(seed=1).take(args.batch_size * args.steps)
    samples = build_samples(rows, dataset, tokenizer)
    collate = YesNoCollator(tokenizer)
    batches = [collate([samples[i + j] for j in range(args.batch_size)]) for i in range(0, len(rows), args.batch_size)]
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    for batch in batches:
        del batch["lengths"]
    shared = {"answer": samples.answer.yes, "saved": [], "load_in_4bit": False}

    def build(kind: str) -> tuple[YesNoModel, torch.optim.Optimizer]:
        language = load_model(args.base_model).requires_grad_(False)
        if kind == "LoRA":
            add_lora(language, RANK, 2 * RANK, 0.05, TARGETS)
            model = YesNoModel(YesNoConfig(**shared, trained=["lora"]), language)
        else:
            cf_model = MF(MFConfig(num_users=dataset.num_users, num_items=dataset.num_items)).eval()
            cora = {"r": RANK, "alpha": 2 * RANK, "targets": TARGETS, "cf_config": cf_model.config.to_dict()}
            model = CoRA(CoRAConfig(**shared, **cora, trained=["projector"]), language, cf_model)
        model.train().to(device)
        return model, torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)

    def step(model: YesNoModel, optimizer: torch.optim.Optimizer) -> None:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    sides = {kind: build(kind) for kind in ("LoRA", "CoRA")}
    for side in sides.values():
        step(*side)
    seconds: dict[str, list[float]] = {kind: [] for kind in sides}
    for _ in range(args.repeats):
        for kind, side in sides.items():
            seconds[kind].append(time_call(lambda side=side: step(*side), device) / len(batches))
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"\na training step of {args.batch_size} rows, rank {RANK}, {', '.join(TARGETS)}")
    for kind, (model, _) in sides.items():
        trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
        print(f"{kind:<8}{medians[kind]:>8.3f} s{medians[kind] / medians['LoRA']:>8.2f} times   {trained:,} trained")
    return {"cora_step_ratio": medians["CoRA"] / medians["LoRA"], "step_seconds": seconds}


def time_call(work, device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


# ---- Quality of the methods: stage by stage, as a user would run them ----


def compare_methods(args: argparse.Namespace) -> dict[str, dict]:
    results: dict[str, dict] = {}
    for name in args.names:
        by_seed = [run_method(args, name, seed) for seed in args.seeds]
        results[name] = {
            "auc": [run["test"]["auc"] for run in by_seed],
            "uauc": [run["test"]["uauc"] for run in by_seed],
            "warm": [[run["warm"][key] for key in ("auc", "uauc")] for run in by_seed],
            "cold": [[run["cold"][key] for key in ("auc", "uauc")] for run in by_seed],
            "seeds": args.seeds,
            "samples": by_seed[0]["test"]["samples"],
            "users_counted": by_seed[0]["test"]["users_counted"],
            "tune_flags": args.tune_flags,
            "test_flags": args.test_flags,
        }
    print(f"\n{'':<16}{'AUC':>8}{'UAUC':>8}   by seed                           published, 7B")
    for name, result in results.items():
        means = "".join(f"{statistics.mean(result[key]):>8.4f}" for key in ("auc", "uauc"))
        seeds = "  ".join(f"{a:.4f}/{u:.4f}" for a, u in zip(result["auc"], result["uauc"], strict=True))
        print(f"{name:<16}{means}   {seeds:<34}{METHODS[name][2]}")
    return results


def run_method(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Return the results of test.py for a method and seed; train and test it unless they are in `--work`."""
    method, kind, _ = METHODS[name]
    work = args.work / f"seed-{seed}"
    data = ["--dataset", "ml-1m", "--data_path", args.data_path]
    stage = work / (f"{method}-{kind}" if kind else method)
    results = stage.with_suffix(".json")
    if results.exists():
        return read_json(results, "results of test.py")
    start = ["--base_model", args.base_model]
    if kind:
        run_method(args, "text only", seed)
        if not (cf_model := work / kind).exists():
            run("pretrain.py", "--model", kind, *data, "--seed", seed, "--output_dir", cf_model,
                "--results_file", work / f"{kind}.json")  # fmt: skip
        start = ["--init_from", work / "tallrec", "--cf_model", cf_model]
    rank = ["--lora_r", 64, "--lora_alpha", 128] if method == "cora" and kind != "mf" else []  # the preset is for MF
    if not (stage / "run.json").exists():
        run("finetune.py", "--config", f"config/{method}.yaml", *rank, *data, *start, "--output_dir", stage,
            "--seed", seed, "--resume_from_checkpoint", "auto", *args.tune_flags.split())  # fmt: skip
    run("test.py", "--ckpt_path", stage, *data, "--results_file", results, *args.test_flags.split())
    return read_json(results, "results of test.py")


def run(*command) -> None:
    command = [str(word) for word in command]
    print(f"\n$ python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise InputError(f"{command[0]} failed, see above")


if __name__ == "__main__":
    main()
