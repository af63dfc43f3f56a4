"""Methods that answer Yes or No: scoring beside the naive way, a CoRA step beside a LoRA step, and what each is worth.

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m bench.preference --data_path ../shared/data --parts scoring step
python -m bench.preference --parts methods --tune_flags "--bf16" --test_flags "--bf16"     # a GPU, all of train
python -m bench.preference --parts methods --test_flags "--sample_num 800" --tune_flags "--train_data_sample_num 800 \
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

from bench.common import last_figures, synchronise, write_results
from reclingua.datasets.collators import pad
from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, read_prompts
from reclingua.datasets.ratings import RatingsDataset, open_ratings
from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.inference.scorer import ask
from reclingua.models.collaborative.mf import MF, MFConfig
from reclingua.models.cora import CoRA, CoRAConfig
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.lora import add_lora
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import read_json

PARTS = ("scoring", "step", "methods")
HISTORY = 10  # titles, the papers'
RANK, TARGETS = 16, ["q_proj", "k_proj", "v_proj", "o_proj"]  # CoRA's with MF
# Name -> method, kind of collaborative model, AUC / UAUC published on this split with models of 7 billion parameters.
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
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the others keep their last figures")
    parser.add_argument("--data_path", default="../shared/data", help="of ml-1m (default: %(default)s)")
    parser.add_argument("--base_model", default="ckpt/base/SmolLM2-135M-Instruct", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="rows of test that are scored (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="training steps of a timing (default: %(default)s)")
    methods = parser.add_argument_group("methods")
    methods.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: %(default)s)")
    methods.add_argument("--names", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    methods.add_argument(
        "--work", type=Path, default=Path("ckpt/bench-preference"), help="what is there is not redone"
    )
    methods.add_argument("--tune_flags", default="", help="more flags for finetune.py; a preset is given anyway")
    methods.add_argument("--test_flags", default="", help="more flags for test.py")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_ratings(args.data_path, "ml-1m")
    figures = last_figures("preference", device)
    if "scoring" in args.parts:
        figures |= time_scoring(args, dataset, device)
    if "step" in args.parts:
        figures |= time_steps(args, dataset, device)
    if "methods" in args.parts:
        figures |= {"methods": compare_methods(args)}
    print(f"\n{write_results('preference', device, figures)}")


def questions_of(rows: Dataset, dataset: RatingsDataset, tokenizer) -> YesNoDataset:
    titles = {int(item): about["title"] for item, about in dataset.items.items()}
    templates = read_prompts(YES_NO_PROMPT_FILE, {"text": YES_NO_FIELDS["text"]})["text"]
    return YesNoDataset(rows, titles, tokenizer, templates[:1], HISTORY, ", ", 8192)


# ---- Scoring: one beginning for many rows, one logit, beside padded batches with all logits ----


def time_scoring(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    tokenizer = load_tokenizer(args.base_model)
    questions = questions_of(dataset.parts["test"].take(args.rows), dataset, tokenizer)
    language = load_model(args.base_model).requires_grad_(False)
    add_lora(language, 8, 16, 0.05, ["q_proj", "v_proj"])
    yes = questions.answer.yes
    model = YesNoModel(YesNoConfig(answer=yes, trained=[], saved=[]), language).eval().to(device)

    @torch.no_grad()
    def naive(questions: YesNoDataset) -> np.ndarray:
        scores = []
        for start in range(0, len(questions), args.batch_size):
            ids = [questions[i]["input_ids"] for i in range(start, min(start + args.batch_size, len(questions)))]
            batch = {
                "input_ids": pad(ids, tokenizer.pad_token_id, left=True).to(device),
                "attention_mask": pad([[1] * len(each) for each in ids], 0, left=True).to(device),
            }
            scores.append(language(**batch, use_cache=False).logits[:, -1, yes].float().cpu())
        return torch.cat(scores).numpy()

    sides = {
        "padded to the longest, all logits": naive,
        "ours": lambda questions: ask(model, questions, args.batch_size, show_progress=False),
    }
    for score in sides.values():
        score(questions_of(dataset.parts["test"].take(8), dataset, tokenizer))  # before the clock: threads start
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    scores = {}
    for _ in range(args.repeats):
        for side, score in sides.items():
            seconds[side].append(timed(lambda score=score, side=side: scores.update({side: score(questions)}), device))
    middle = {side: statistics.median(times) for side, times in seconds.items()}
    first, ours = sides
    print(f"\nscoring {args.rows} rows, {questions.lengths().mean():.0f} tokens each, batches of {args.batch_size}")
    for side, time_taken in middle.items():
        apart = np.abs(scores[side] - scores[first]).max()
        print(
            f"{side:<36}{args.rows / time_taken:>8.2f} rows/s{middle[first] / time_taken:>8.2f} x   {apart:.0e} apart"
        )
    return {
        "ratio_vs_naive": middle[first] / middle[ours],
        "scoring": {
            "rows": args.rows,
            "batch_size": args.batch_size,
            "tokens": float(questions.lengths().mean()),
            "seconds": seconds,
            "largest_difference": float(np.abs(scores[ours] - scores[first]).max()),
        },
    }


# ---- A training step of CoRA beside one of LoRA ----


def time_steps(args: argparse.Namespace, dataset: RatingsDataset, device: torch.device) -> dict:
    tokenizer = load_tokenizer(args.base_model)
    rows = dataset.parts["train"].shuffle(seed=1).take(args.batch_size * args.steps)
    questions = questions_of(rows, dataset, tokenizer)
    collate = YesNoCollator(tokenizer)
    batches = [
        collate([questions[i + j] for j in range(args.batch_size)]) for i in range(0, len(rows), args.batch_size)
    ]
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    for batch in batches:
        del batch["lengths"]
    shared = {"answer": questions.answer.yes, "saved": [], "load_in_4bit": False}

    def build(kind: str) -> tuple[YesNoModel, torch.optim.Optimizer]:
        language = load_model(args.base_model).requires_grad_(False)
        if kind == "LoRA":
            add_lora(language, RANK, 2 * RANK, 0.05, TARGETS)
            model = YesNoModel(YesNoConfig(**shared, trained=["lora"]), language)
        else:
            cf_model = MF(MFConfig(num_users=dataset.num_users, num_items=dataset.num_items)).eval()
            own = {"r": RANK, "alpha": 2 * RANK, "targets": TARGETS, "cf_config": cf_model.config.to_dict()}
            model = CoRA(CoRAConfig(**shared, **own, trained=["projector"]), language, cf_model)
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
            seconds[kind].append(timed(lambda side=side: step(*side), device) / len(batches))
    middle = {kind: statistics.median(times) for kind, times in seconds.items()}
    print(f"\na training step of {args.batch_size} rows, rank {RANK}, {', '.join(TARGETS)}")
    for kind, (model, _) in sides.items():
        trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
        print(f"{kind:<8}{middle[kind]:>8.3f} s{middle[kind] / middle['LoRA']:>8.2f} times   {trained:,} trained")
    return {"cora_step_ratio": middle["CoRA"] / middle["LoRA"], "step_seconds": seconds}


def timed(work, device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


# ---- What the methods are worth: stage by stage, as a user would run them ----


def compare_methods(args: argparse.Namespace) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name in args.names:
        by_seed = [run_method(args, name, seed) for seed in args.seeds]
        found[name] = {
            "auc": [each["test"]["auc"] for each in by_seed],
            "uauc": [each["test"]["uauc"] for each in by_seed],
            "warm": [[each["warm"][key] for key in ("auc", "uauc")] for each in by_seed],
            "cold": [[each["cold"][key] for key in ("auc", "uauc")] for each in by_seed],
            "seeds": args.seeds,
            "samples": by_seed[0]["test"]["samples"],
            "users_counted": by_seed[0]["test"]["users_counted"],
            "tune_flags": args.tune_flags,
            "test_flags": args.test_flags,
        }
    print(f"\n{'':<16}{'AUC':>8}{'UAUC':>8}   by seed                           published, 7B")
    for name, each in found.items():
        means = "".join(f"{statistics.mean(each[key]):>8.4f}" for key in ("auc", "uauc"))
        seeds = "  ".join(f"{a:.4f}/{u:.4f}" for a, u in zip(each["auc"], each["uauc"], strict=True))
        print(f"{name:<16}{means}   {seeds:<34}{METHODS[name][2]}")
    return found


def run_method(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Results of test.py for one method and seed, trained and measured now unless they are in `--work`."""
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
    config = f"config/{method}{f'-{kind}' if method in ('collm', 'cora') else ''}.yaml"
    if not (stage / "run.json").exists():
        run("finetune.py", "--config", config, *data, *start, "--output_dir", stage, "--seed", seed,
            "--resume_from_checkpoint", "auto", *args.tune_flags.split())  # fmt: skip
    run("test.py", "--ckpt_path", stage, *data, "--results_file", results, *args.test_flags.split())
    return read_json(results, "results of test.py")


def run(*command) -> None:
    command = [str(word) for word in command]
    print(f"\n$ python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise InputError(f"{command[0]} stopped; see above")


if __name__ == "__main__":
    main()
