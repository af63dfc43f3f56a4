"""Benchmark Yes/No methods: trees next to one row a pass, a CoRA step next to a LoRA step, and AUC of each method.

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m bench.preference --data_path ~/datasets --parts scoring training step
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset

from bench.common import earlier_figures, synchronise, write_results
from reclingua import Scorer
from reclingua.datasets.collators import move_batch, pad
from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, read_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings, to_numpy
from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.collm import CoLLM, CoLLMConfig
from reclingua.models.cora import CoRA, CoRAConfig
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.lora import add_lora
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import read_json
from reclingua.utils.metadata import CheckpointMetadata

PARTS = ("scoring", "training", "step", "methods")
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
    parser.add_argument("--rows", type=int, default=256, help="rows that are scored or trained (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a training batch (default: %(default)s)")
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
    if "training" in args.parts:
        figures |= time_training(args, dataset, device)
    if "step" in args.parts:
        figures |= time_steps(args, dataset, device)
    if "methods" in args.parts:
        figures |= {"methods": compare_methods(args)}
    print(f"\n{write_results('preference', device, figures)}")


def build_samples(rows: Dataset, dataset: RatingsDataset, tokenizer, task: str = "text", **trees) -> YesNoDataset:
    """Return rows as prompts, one a tree with the last HISTORY titles unless `trees` says otherwise."""
    titles = {int(item): about["title"] for item, about in dataset.items.items()}
    templates = read_prompts(YES_NO_PROMPT_FILE, {task: YES_NO_FIELDS[task]})[task]
    return YesNoDataset(rows, titles, tokenizer, templates[:1], HISTORY, ", ", 8192, **trees)


# ---- Trees: many rows of a user in one pass, next to one row a pass ----

LAYOUTS = {
    "one row a pass, last 10 titles": {},
    "one row a pass, anchored window": {"history_window": "anchored"},
    "trees, last 10 titles": {"rows_per_tree": 16},
    "trees, anchored window": {"history_window": "anchored", "rows_per_tree": 16},
}


def users_of(part: Dataset, count: int) -> Dataset:
    """Return all rows of random users, about `count` rows: single rows would have nothing to share."""
    users = to_numpy(part, "uid")
    order = np.random.default_rng(0).permutation(np.unique(users))
    sizes = np.cumsum([np.sum(users == user) for user in order])
    chosen = order[: int(np.searchsorted(sizes, count)) + 1]
    return part.select(np.flatnonzero(np.isin(users, chosen)))


def time_scoring(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    """Time the scoring of the same rows in each layout, and in padded batches with all logits."""
    tokenizer = load_tokenizer(args.base_model)
    part = users_of(dataset.parts["test"], args.rows)
    samples = {name: build_samples(part, dataset, tokenizer, **trees) for name, trees in LAYOUTS.items()}
    first, anchored, _, ours = LAYOUTS
    language = load_model(args.base_model).requires_grad_(False)
    add_lora(language, 8, 16, 0.05, ["q_proj", "v_proj"])
    yes = samples[first].answer.yes
    model = YesNoModel(YesNoConfig(answer=yes, trained=[], saved=[]), language).eval().to(device)
    scorer = Scorer(model, dataset, CheckpointMetadata("tallrec", dataset.name, prompts={"text": []}), tokenizer)

    @torch.no_grad()
    def naive() -> np.ndarray:
        rows, scores = samples[first], []
        for start in range(0, len(rows), args.batch_size):
            ids = [rows[i]["input_ids"] for i in range(start, min(start + args.batch_size, len(rows)))]
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id, left=True).to(device),
                "attention_mask": pad([[1] * len(row) for row in ids], 0, left=True).to(device),
            }
            scores.append(language(**batch, use_cache=False).logits[:, -1, yes].float().cpu())
        return torch.cat(scores).numpy()

    sides = {"padded, all logits, last 10 titles": naive}
    sides |= {name: lambda rows=rows: scorer.score_samples(rows, args.batch_size) for name, rows in samples.items()}
    scorer.score_samples(build_samples(part.take(8), dataset, tokenizer), 8)  # warm-up: threads start
    scores: dict[str, np.ndarray] = {}
    seconds = time_sides({side: lambda s=side: scores.update({s: sides[s]()}) for side in sides}, args, device)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    tokens = {name: float(rows.lengths().sum() / len(part)) for name, rows in samples.items()}
    print(f"\nscoring {len(part)} rows, batches of {args.batch_size}")
    for side, median in medians.items():
        size = f"{tokens[side]:>8.1f} tokens a row" if side in tokens else ""
        print(f"{side:<36}{len(part) / median:>8.2f} rows/s{medians[first] / median:>8.2f} x{size}")
    differences = {
        "naive": float(np.abs(scores["padded, all logits, last 10 titles"] - scores[first]).max()),
        "sliding": float(np.abs(scores["trees, last 10 titles"] - scores[first]).max()),
        "anchored": float(np.abs(scores[ours] - scores[anchored]).max()),
    }
    print("largest differences: " + ", ".join(f"{name} {value:.0e}" for name, value in differences.items()))
    return {
        "scoring_ratio": medians[first] / medians[ours],
        "ratio_vs_naive": medians["padded, all logits, last 10 titles"] / medians[ours],
        "scoring": {"rows": len(part), "tokens": tokens, "seconds": seconds, "largest_differences": differences},
    }


def time_training(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    """Time a pass over the same rows, first stage (LoRA) and CoLLM's second stage, in one-row and tree layout."""
    tokenizer = load_tokenizer(args.base_model)
    part = users_of(dataset.parts["train"], args.rows)
    figures: dict[str, dict] = {}
    for stage, task in (("LoRA", "text"), ("CoLLM, second stage", "soft")):
        language = load_model(args.base_model).requires_grad_(False)
        add_lora(language, 8, 16, 0.0, ["q_proj", "v_proj"])
        if stage == "LoRA":
            model = YesNoModel(YesNoConfig(trained=["lora"], saved=[]), language)
        else:
            cf_model = MF(MFConfig(num_users=dataset.num_users, num_items=dataset.num_items)).eval()
            config = CoLLMConfig(trained=["projector"], saved=[], cf_config=cf_model.config.to_dict())
            model = CoLLM(config, language, cf_model)
        model.train().to(device)
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
        batches = {
            name: build_batches(build_samples(part, dataset, tokenizer, task, **LAYOUTS[name]), args.tokens, device)
            for name in ("one row a pass, last 10 titles", "trees, anchored window")
        }

        def train(side: str, batches=batches, model=model, optimizer=optimizer) -> None:
            for batch in batches[side]:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        for side in batches:
            model(**batches[side][0]).loss.backward()  # warm-up
        seconds = time_sides({side: lambda s=side: train(s) for side in batches}, args, device)
        rows, trees = (statistics.median(times) for times in seconds.values())
        speeds = f"{len(part) / rows:.2f} rows/s one row a pass, {len(part) / trees:.2f} as trees"
        print(f"{stage}: {speeds}, {rows / trees:.2f} x")
        figures[stage] = {"ratio": rows / trees, "rows": len(part), "seconds": seconds}
    return {"training": figures}


def build_batches(samples: YesNoDataset, tokens: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return batches of samples of similar length, at most `tokens` tokens with padding."""
    sampler = LengthGroupedBatchSampler(samples.lengths(), max_tokens=max(tokens, int(samples.lengths().max())))
    collate, batches = YesNoCollator(samples.tokenizer), []
    for numbers in sampler:
        batch = collate([samples[number] for number in numbers])
        del batch["lengths"]
        batches.append(move_batch(batch, device))
    return batches


def time_sides(sides: dict[str, Callable], args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each side, taken in turns."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, work in sides.items():
            seconds[side].append(time_call(work, device))
    return seconds


# ---- Training: a step of CoRA next to one of LoRA ----


def time_steps(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    tokenizer = load_tokenizer(args.base_model)
    rows = dataset.parts["train"].shuffle(seed=1).take(args.batch_size * args.steps)
    samples = build_samples(rows, dataset, tokenizer)
    collate = YesNoCollator(tokenizer)
    batches = [collate([samples[i + j] for j in range(args.batch_size)]) for i in range(0, len(rows), args.batch_size)]
    batches = [move_batch(batch, device) for batch in batches]
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
