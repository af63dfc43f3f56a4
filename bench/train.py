"""Benchmark training next to LC-Rec's (random batches, padding to the longest, all logits, plain Trainer).

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m bench.train --data_path ~/datasets --ml_100k data     # data/ml-100k as run.sh makes it
python -m bench.train --data_path ~/datasets --ml_100k data --bf16 --updates 60 --batch_size 32
"""

from reclingua.utils.logging import silence_third_party

import argparse
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from bench.common import Peak, remove_duplicates, write_results
from reclingua.datasets.collators import IGNORE, CausalLMCollator
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import LCREC_PROMPT_FILE, read_prompts
from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.datasets.tasks import seqrec_task, train_samples
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.vocabulary import extend_vocabulary, index_token_ids
from reclingua.training.arguments import TuningArguments
from reclingua.training.callbacks import ThroughputCallback
from reclingua.training.throughput import Throughput
from reclingua.training.trainer import RecTrainer
from reclingua.utils.errors import InputError, cli_main, one_line_errors

MAX_HIS_LEN = 20  # LC-Rec's
# Each side adds to the one before it, except that packing replaces batches by length.
SIDES = {
    "LC-Rec's way": {"plain": True},
    "+ output head where labels are": {},
    "+ batches by length": {"order": "group_by_length"},
    "+ batches by tokens": {"order": "group_by_length", "by_tokens": True},
    "packing, by tokens": {"by_tokens": True, "packing": True},
    "whole histories, by tokens": {"order": "group_by_length", "by_tokens": True, "targets": "all"},
}
DEFAULTS: dict = {"plain": False, "order": "random", "by_tokens": False, "packing": False, "targets": "last"}
OURS, HISTORY = "+ batches by tokens", "whole histories, by tokens"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path",
        type=Path,
        default=Path("../shared/data"),
        help="folder of Instruments (default: %(default)s)",
    )
    parser.add_argument("--ml_100k", type=Path, default=Path("data"), help="folder of ml-100k (default: %(default)s)")
    parser.add_argument("--base_model", default="ckpt/base/SmolLM2-135M-Instruct", help="(default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8, help="updates of each side (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples per update (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (a GPU is used if there is one)")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    if not (args.ml_100k / "ml-100k" / "ml-100k.index.json").exists():
        raise InputError(f"{args.ml_100k}/ml-100k: has no index; make one by bash run.sh, or name its folder")
    timings: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"Instruments: {remove_duplicates(args.data_path, 'Instruments', Path(folder))} duplicate items removed")
        for name, path in (("Instruments", folder), ("ml-100k", args.ml_100k)):
            timings[name] = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side in SIDES:
                    # A process for each side, so that none inherits memory of another.
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        timings[name][side].append(pool.apply(train_side, (args, name, str(path), side)))
            print_table(name, timings[name])
    figures: dict = {name: ratios(by_side) for name, by_side in timings.items()}
    instruments, ml = figures["Instruments"], figures["ml-100k"]
    figures |= {
        "ratio_next": instruments[OURS]["targets_per_s_ratio"],
        "memory_ratio": instruments[OURS]["memory_mb_ratio"],
        "ratio_history": instruments[HISTORY]["items_per_s_ratio"],
        "ratio_history_ml_100k": ml[HISTORY]["items_per_s_ratio"],
    }
    for name in ("ratio_next", "memory_ratio", "ratio_history", "ratio_history_ml_100k"):
        print(f"{name:<24} {figures[name]:.2f}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\n{write_results('train', device, {'arguments': vars(args), **figures, 'timings': timings})}")


def fewest_tokens(lengths: np.ndarray, settings: dict, updates: int) -> int:
    """Return the smallest batch, in tokens, that makes no more than so many updates of an epoch."""
    longest, is_packed = int(max(lengths)), settings["packing"]
    for tokens in range(2 * longest if is_packed else longest, int(sum(lengths)) + 2 * longest, 8):
        if len(LengthGroupedBatchSampler(lengths, 1, tokens, is_packed, settings["order"])) <= updates:
            return tokens
    raise ValueError("no batch is large enough")


def build_trainer(
    args: argparse.Namespace, output: str, settings: dict, model, tokenizer, instructions, batches
) -> tuple[transformers.Trainer, Throughput]:
    """Return the plain Trainer or ours, and what counts its throughput."""
    collator = CausalLMCollator(tokenizer, settings["packing"])
    training_args = TuningArguments(
        output_dir=output,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        save_and_eval_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        bf16=args.bf16,
    )
    shared: dict = {
        "model": model,
        "args": training_args,
        "train_dataset": instructions,
        "processing_class": tokenizer,
    }
    if not settings["plain"]:
        own = {"max_logits_mb": training_args.max_logits_mb, "compute_valid_metrics": None, "metadata": None}
        trainer = RecTrainer(**shared, **own, batches=batches, data_collator=collator)
        return trainer, trainer.throughput
    training_args.train_sampling_strategy = "random"
    drop_lengths = lambda rows: {k: v for k, v in collator(rows).items() if k != "lengths"}  # noqa: E731
    trainer = transformers.Trainer(**shared, data_collator=drop_lengths)
    trainer.pop_callback(transformers.PrinterCallback)
    throughput = Throughput(model, trainer.args.device)
    trainer.add_callback(ThroughputCallback(throughput))
    return trainer, throughput


def train_side(args: argparse.Namespace, name: str, data_path: str, side: str) -> dict[str, float]:
    """Train one side on the same samples; return items, targets (labelled tokens) and tokens per second, and memory.

    Memory, MB, is that above weights, gradients and optimizer state.
    """
    settings = DEFAULTS | SIDES[side]
    silence_third_party()
    dataset = open_interactions(data_path, name, ["index"])
    tokenizer, model = load_tokenizer(args.base_model), load_model(args.base_model)
    extend_vocabulary(model, tokenizer, dataset.index)
    model.config.use_cache = False
    codes = index_token_ids(tokenizer, dataset.index)
    count = args.updates * args.batch_size
    samples = train_samples(dataset, seqrec_task(settings["targets"]), MAX_HIS_LEN, count=count, seed=1)
    instructions = InstructionDataset(
        samples, dataset, tokenizer, read_prompts(LCREC_PROMPT_FILE), codes, MAX_HIS_LEN, ", "
    )
    lengths = instructions.lengths(longest=True)
    tokens = fewest_tokens(lengths, settings, args.updates) if settings["by_tokens"] else 0
    batches = LengthGroupedBatchSampler(
        lengths, args.batch_size, tokens, settings["packing"], settings["order"], epoch_lengths=instructions.lengths
    )
    rows = [instructions[i] for i in range(count)]
    targets = sum(label != IGNORE for row in rows for label in row["labels"][1:])
    depth = len(next(iter(codes.values())))
    items = count if settings["targets"] == "last" else targets / depth

    with tempfile.TemporaryDirectory() as output:
        trainer, throughput = build_trainer(args, output, settings, model, tokenizer, instructions, batches)
        device = next(model.parameters()).device
        first_row = {k: v.to(device) for k, v in CausalLMCollator(tokenizer)(rows[:1]).items() if k != "lengths"}
        model(**first_row).loss.backward()  # warm-up: libraries load, threads start, Adam makes its state
        trainer.create_optimizer().step()
        model.zero_grad()
        with Peak(device) as peak:
            trainer.train()
    gradients = sum(w.numel() * w.element_size() for w in model.parameters()) / 2**20
    figures = {
        "items_per_s": items / throughput.seconds,
        "targets_per_s": targets / throughput.seconds,
        "tokens_per_s": sum(len(row["input_ids"]) for row in rows) / throughput.seconds,
        "memory_mb": peak.mb - peak.before - gradients,
        "seconds": throughput.seconds,
        "updates": trainer.state.global_step,
        "max_tokens_per_batch": tokens,
    }
    if not settings["plain"]:
        rates = throughput.figures(trainer.accelerator)
        figures |= {key: rates[key] for key in ("padding", "tflops", "mfu") if key in rates}
    return figures


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def ratios(timings: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Return the medians of each side relative to those of the first."""
    first, *_ = map(medians, timings.values())
    keys = ("items_per_s", "targets_per_s", "memory_mb")
    return {side: {f"{key}_ratio": medians(runs)[key] / first[key] for key in keys} for side, runs in timings.items()}


def print_table(name: str, timings: dict[str, list[dict]]) -> None:
    print(f"\n{name:<34}{'items/s':>9}{'targets/s':>11}{'tokens/s':>10}{'memory MB':>11}{'times items/s':>15}")
    for (side, runs), ratio in zip(timings.items(), ratios(timings).values(), strict=True):
        row = medians(runs)
        print(
            f"{side:<34}{row['items_per_s']:>9.2f}{row['targets_per_s']:>11.1f}{row['tokens_per_s']:>10.0f}"
            f"{row['memory_mb']:>11,.0f}{ratio['items_per_s_ratio']:>15.2f}"
            + (f"   MFU {row['mfu']:.1%}" if "mfu" in row else "")
        )


if __name__ == "__main__":
    main()
