"""Benchmark constrained beam search next to `generate()` and to a search that reorders its cache; lists must agree.

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m bench.decode --data_path ~/datasets
python -m bench.decode --data_path ~/datasets --device cuda --dtype bfloat16 --users 256 --peak_tflops 989 \
    --generate_batches 4,8,16,32,64 --search_batches 16,32,64,128,256
"""

from reclingua.utils.logging import silence_third_party

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from bench.common import Peak, remove_duplicates, synchronise, write_results
from reclingua import Recommender
from reclingua.datasets.collators import prompt_batch
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, read_prompts
from reclingua.datasets.tasks import held_out_samples
from reclingua.decoding.beam_search import beam_search
from reclingua.decoding.kv_cache import DecoderSelector, TreeAttentionDecoder
from reclingua.decoding.trie import TENSORS, Trie
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.vocabulary import extend_vocabulary
from reclingua.utils.errors import cli_main, one_line_errors
from reclingua.utils.metadata import CheckpointMetadata

ROOT = Path(__file__).parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=Path("../shared/data"), help="(default: %(default)s)")
    parser.add_argument("--dataset", default="Instruments", help="(default: %(default)s)")
    parser.add_argument("--base_model", default="ckpt/base/SmolLM2-135M-Instruct", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--users", type=int, default=40, help="users with 20 items of history (default: %(default)s)")
    parser.add_argument("--num_beams", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side (default: %(default)s)")
    parser.add_argument("--generate_batches", default="1,2", help="batch sizes to choose from (default: %(default)s)")
    parser.add_argument(
        "--search_batches", default="10,20,40", help="batch sizes to choose from (default: %(default)s)"
    )
    parser.add_argument("--peak_tflops", type=float, help="peak of the device in this dtype, for MFU")
    parser.add_argument(
        "--ddp_users", type=int, default=96, help="users for test.py, test_ddp.py (default: %(default)s)"
    )
    parser.add_argument(
        "--trie_items", type=int, default=1_000_000, help="items of a large trie (default: %(default)s)"
    )
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    args = parse_args()
    silence_third_party()
    device = torch.device(args.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(args, device, Path(folder))
        figures = compare(setup, args) | measure_trie_share(setup, args) | measure_trie(args.trie_items, device)
        figures["trie_1m_lookup_share"] = figures["trie_1m_lookup_ms"] / figures["step_of_64_users_ms"]
        model_folder = setup.tuned
        del setup  # frees memory for the other processes
        figures |= time_processes(model_folder, Path(folder), args, device)
    names = ("ratio_vs_generate", "ratio_vs_reorder_cache", "same_lists", "trie_share", "ddp_ratio", "trie_1m_seconds")
    for name in (*names, "trie_1m_mb", "trie_1m_lookup_ms", "trie_1m_lookup_share"):
        print(f"{name:<24} {figures.get(name, 'not measured')}")
    print(f"\n{write_results('decode', device, {'arguments': vars(args), **figures})}")


class Setup:
    """Prompts of users with 20 items of history, and a model with the semantic-ID tokens of all items."""

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: Path):
        num_removed = remove_duplicates(args.data_path, args.dataset, folder)
        dataset = open_interactions(folder, args.dataset, ["index"])
        self.device, self.num_beams = device, args.num_beams
        self.tokenizer, model = load_tokenizer(args.base_model), load_model(args.base_model)
        extend_vocabulary(model, self.tokenizer, dataset.index)
        prompts = read_prompts(LCREC_PROMPT_FILE, {"seqrec": FIELDS["seqrec"]})
        metadata = CheckpointMetadata(
            method="lcrec",
            dataset=dataset.name,
            base_model=args.base_model,
            prompts={task: [asdict(template) for template in templates] for task, templates in prompts.items()},
            max_his_len=20,
            his_sep=", ",
            targets="last",
            tasks=["seqrec"],
            index_sha256=dataset.sha256("index"),
            histories_sha256=dataset.sha256("histories"),
        )
        # A checkpoint like those of finetune.py: the speed of a test does not depend on the weights.
        self.tuned = folder / "tuned"
        model.save_pretrained(self.tuned)
        self.tokenizer.save_pretrained(self.tuned)
        metadata.save(self.tuned)
        self.model = model.to(device, getattr(torch, args.dtype)).eval()
        recommender = Recommender(self.model, self.tokenizer, dataset, metadata)
        self.token_ids, self.selector = recommender.token_ids, recommender.selector
        self.trie = recommender.trie.to(device)
        samples = held_out_samples(dataset, "test", "seqrec", max_his_len=20)
        full = [row for row, history in enumerate(samples["history"]) if len(history) == 20]
        self.rows = recommender.encode(samples.select(full[: args.users]))
        print(
            f"{args.base_model}, {args.dtype} on {device}; {len(self.rows)} users of {args.dataset} ({num_removed} "
            f"duplicate items removed), prompts of up to {max(map(len, self.rows))} tokens, {args.num_beams} beams"
        )

    def search(self, batch: dict, **options) -> list[list[tuple[str, float]]]:
        """Return our (item, score) pairs of each prompt, best first."""
        options = {"selector": self.selector} | options
        lists = beam_search(self.model, **batch, trie=self.trie, num_beams=self.num_beams, **options)
        return [[(scored.item, scored.score) for scored in items] for items in lists]

    def run(self, side: Callable, size: int, users: int | None = None) -> tuple[float, list]:
        """Return the seconds for the first `users` in batches of `size`, and their lists."""
        rows, lists = self.rows[:users], []
        batches = [
            prompt_batch(self.tokenizer, rows[start : start + size]).to(self.device)
            for start in range(0, len(rows), size)
        ]
        synchronise(self.device)
        began = time.perf_counter()
        for batch in batches:
            lists += side(batch)
        synchronise(self.device)
        return time.perf_counter() - began, lists


def compare(setup: Setup, args: argparse.Namespace) -> dict:
    """Compare `generate()`, a search that reorders its cache and ours, each at its best batch size, in turn."""
    replicated = DecoderSelector(setup.model, "replicated")
    sides = {
        "generate": (
            generate_side(setup.model, setup.token_ids, setup.num_beams, setup.tokenizer.eos_token_id),
            args.generate_batches,
        ),
        "reorder_cache": (
            lambda batch: setup.search(batch, selector=replicated),
            args.search_batches,
        ),
        "ours": (setup.search, args.search_batches),
    }
    users, best, seconds_by_size = len(setup.rows), {}, {}
    for name, (side, sizes) in sides.items():
        sizes = sorted({min(int(size), users) for size in sizes.split(",")})
        setup.run(side, sizes[0], users=sizes[0])  # warm-up
        seconds_by_size[name] = {size: setup.run(side, size, users=sizes[-1])[0] / sizes[-1] for size in sizes}
        best[name] = min(seconds_by_size[name], key=seconds_by_size[name].get)
        shown = "   ".join(f"{size}: {time:.4f}" for size, time in seconds_by_size[name].items())
        print(f"  {name}, seconds a user by batch size   {shown}", flush=True)
    seconds, peak, lists = defaultdict(list), {}, {}
    for _ in range(args.repeats):
        for name, (side, _) in sides.items():
            with Peak(setup.device) as memory:
                elapsed, lists[name] = setup.run(side, best[name])
            seconds[name].append(elapsed)
            peak[name] = memory.mb
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = {name: users / time for name, time in median.items()}
    ratio = {name: time / median["ours"] for name, time in median.items()}

    print(f"\n{'':<14}{'batch':>6}{'users/s':>10}{'items/s':>10}{'peak MB':>10}{'ours is':>11}")
    for name in sides:
        print(
            f"{name:<14}{best[name]:>6}{rate[name]:>10.2f}{rate[name] * args.num_beams:>10.1f}{peak[name]:>10.0f}",
            end="",
        )
        print(f"{ratio[name]:>10.2f}x")
    print()
    items = {name: [[item for item, _ in pairs] for pairs in rows] for name, rows in lists.items()}
    scores = {name: torch.tensor([[score for _, score in pairs] for pairs in rows]) for name, rows in lists.items()}
    figures = {
        "ratio_vs_generate": round(ratio["generate"], 2),
        "ratio_vs_reorder_cache": round(ratio["reorder_cache"], 2),
        "same_lists": all(rows == items["ours"] for rows in items.values()),
        "users_with_the_same_list": {
            name: sum(a == b for a, b in zip(rows, items["ours"], strict=True)) for name, rows in items.items()
        },
        "largest_score_difference": {
            name: (tensor - scores["ours"]).abs().max().item() for name, tensor in scores.items()
        },
        "users_per_second": rate,
        "items_per_second": {name: value * args.num_beams for name, value in rate.items()},
        "peak_mb": peak,
        "batch_size": best,
        "seconds_per_user_by_batch_size": seconds_by_size,
        "seconds": seconds,
        "prompt_tokens": [len(row) for row in setup.rows],
    }
    if args.peak_tflops:
        with FlopCounterMode(display=False) as counter:
            setup.run(setup.search, best["ours"])
        figures["share_of_peak_flops"] = counter.get_total_flops() / median["ours"] / 1e12 / args.peak_tflops
        print(f"MFU: {figures['share_of_peak_flops']:.1%}")
    return figures


def measure_trie_share(setup: Setup, args: argparse.Namespace) -> dict:
    """Return the share of search time spent in the trie, and the time of a decoding step of the beams of 64 users."""
    names, spent = ("children", "exhausted_states", "is_exhausted"), []

    def timed(look_up: Callable) -> Callable:
        def run(*arguments):
            synchronise(setup.device)
            began = time.perf_counter()
            result = look_up(*arguments)
            synchronise(setup.device)
            spent.append(time.perf_counter() - began)
            return result

        return run

    for name in names:
        setattr(setup.trie, name, timed(getattr(setup.trie, name)))
    seen = torch.randint(len(setup.trie), (len(setup.rows), 20), device=setup.device)
    elapsed, _ = setup.run(lambda batch: setup.search(batch, excluded=seen[: len(batch["input_ids"])]), 8)
    for name in names:
        delattr(setup.trie, name)

    batch = prompt_batch(setup.tokenizer, (setup.rows * 64)[:64]).to(setup.device)
    decoder = TreeAttentionDecoder(setup.model, capacity=batch["input_ids"].shape[1] + 2 * args.num_beams)
    tokens = torch.randint(int(setup.trie.token.max()), (64, args.num_beams), device=setup.device)
    with torch.no_grad():
        decoder.prefill(**batch)
        decoder.step(tokens, torch.zeros_like(tokens))  # warm-up
        synchronise(setup.device)
        began = time.perf_counter()
        decoder.step(tokens, torch.zeros_like(tokens))
        synchronise(setup.device)
    return {"trie_share": sum(spent) / elapsed, "step_of_64_users_ms": (time.perf_counter() - began) * 1000}


def time_processes(tuned: Path, data_path: Path, args: argparse.Namespace, device: torch.device) -> dict:
    """Time test.py next to test_ddp.py with two processes, start and end included, on one checkpoint."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return {}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    seconds, environment = defaultdict(list), {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    for _ in range(args.repeats):
        for name, start in (("test", ["test.py"]), ("test_ddp", [*torchrun, "test_ddp.py"])):
            flags = ["--ckpt_path", tuned, "--data_path", data_path, "--sample_num", args.ddp_users]
            flags += ["--test_batch_size", 16, "--results_file", data_path / f"{name}.json"]
            began = time.perf_counter()
            command = [sys.executable, *start, *map(str, flags)]
            subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return {
        "ddp_ratio": round(statistics.median(seconds["test"]) / statistics.median(seconds["test_ddp"]), 3),
        "ddp_seconds": seconds,
    }


def generate_side(model: PreTrainedModel, token_ids: dict[str, list[int]], num_beams: int, end: int) -> Callable:
    """Return a function that searches by `generate()` over a Python trie of semantic IDs of one length."""
    depth, next_tokens = len(next(iter(token_ids.values()))), defaultdict(set)
    for tokens in token_ids.values():
        for length, token in enumerate([*tokens, end]):
            next_tokens[tuple(tokens[:length])].add(token)
    next_tokens = {path: sorted(tokens) for path, tokens in next_tokens.items()}
    item_of = {tuple(tokens): item for item, tokens in token_ids.items()}

    def side(batch):
        start = batch["input_ids"].shape[1]
        output = model.generate(
            **batch, max_new_tokens=depth + 1, num_beams=num_beams, num_return_sequences=num_beams, do_sample=False,
            length_penalty=0.0, eos_token_id=end, pad_token_id=end, output_scores=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, tokens: next_tokens.get(tuple(tokens[start:].tolist()), [end]),
        )  # fmt: skip
        items = [item_of[tuple(row)] for row in output.sequences[:, start : start + depth].tolist()]
        pairs = list(zip(items, output.sequences_scores.tolist(), strict=True))
        return [pairs[row : row + num_beams] for row in range(0, len(pairs), num_beams)]

    return side


def measure_trie(items: int, device: torch.device) -> dict:
    """Return build time, size and look-up time of a trie of distinct random semantic IDs, four levels of 256 codes."""
    codes = np.random.default_rng(0).choice(256**4, size=items + items // 20, replace=True)
    codes = np.unique(codes)
    codes = np.random.default_rng(1).permutation(codes)[:items]
    rows = np.stack([codes // 256**level % 256 + 256 * level for level in range(4)], axis=1)
    sequences = {str(item): row for item, row in enumerate(rows.tolist())}
    began = time.perf_counter()
    trie = Trie.build(sequences)
    built = time.perf_counter() - began
    tensors = sum(getattr(trie, name).nbytes for name in TENSORS)
    names = trie.items.nbytes + sum(
        len(name) for name in trie.items if len(name) > 15
    )  # longer ones are stored separately
    trie.to(device)
    states = torch.randint(1, 257, (64, 20), device=device)
    times = []
    for _ in range(21):
        synchronise(device)
        began = time.perf_counter()
        trie.children(states, 1)
        synchronise(device)
        times.append(time.perf_counter() - began)
    return {
        "trie_1m_items": len(trie),
        "trie_1m_seconds": round(built, 2),
        "trie_1m_mb": (tensors + names) / 2**20,
        "trie_1m_tensors_mb": tensors / 2**20,
        "trie_1m_lookup_ms": statistics.median(times) * 1000,
    }


if __name__ == "__main__":
    main()
