"""Measure a model: its search for every test user's next item, or its AUC and UAUC on what test users liked.

Beside the results file, results/D/lcrec.json, stands its report, results/D/lcrec/report.html (see report.py).

python test.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --exclude_seen
python test.py --ckpt_path ckpt/ml-100k/lcrec --test_prompt_ids all --num_beams 20 --predictions_file out.jsonl
python test.py --ckpt_path ckpt/ml-1m/mf --dataset ml-1m --data_path ../shared/data
python test.py --ckpt_path ckpt/ml-1m/collm-mf --dataset ml-1m --data_path ../shared/data --cold_text_only
"""

from reclingua.utils.logging import silence_third_party

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from reclingua.baselines import fit_baselines
from reclingua.datasets.interactions import RecDataset, dataset_file
from reclingua.datasets.ratings import open_ratings, sample_ratings, to_numpy
from reclingua.datasets.tasks import TEST_TASKS, USER_TASKS, held_out_samples, seqrec_task
from reclingua.datasets.user_texts import read_users
from reclingua.decoding.beam_search import SCORE_OVER, ScoredItem
from reclingua.inference import loading
from reclingua.inference.collaborative import auc_metrics, check_same_dataset, model_inputs, print_table, score
from reclingua.inference.loading import (
    instructions_of,
    open_asked,
    open_indexed,
    phrasings_of,
    questions_of,
    read_record,
)
from reclingua.inference.recommender import recommend, trie_of
from reclingua.inference.scorer import ask
from reclingua.metrics import parse_metrics, ranking_metrics
from reclingua.models.collaborative import load_collaborative
from reclingua.models.language import load_tokenizer
from reclingua.models.registry import YES_NO_METHODS, run_name
from reclingua.models.vocabulary import index_token_ids
from reclingua.reporting.codebook import describe
from reclingua.reporting.details import next_item_details, training_curves, yes_no_details
from reclingua.reporting.single_run import write_report
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_write, output_file, write_json
from reclingua.utils.metadata import run_metadata


def task_of(name: str) -> str:
    """The test of that name, in whatever case."""
    return next((task for task in TEST_TASKS if task.lower() == name.lower()), name)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt_path", type=Path, required=True, help="folder written by finetune.py or pretrain.py")
    model.add_argument("--gpu_id", type=int, default=0, help="GPU to use, where there is one (default: %(default)s)")
    model.add_argument("--base_model", help="where the base model of an adapter folder is now, if it has moved")
    model.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights stay as they are")
    model.add_argument("--lora", action="store_true", help="no effect, kept for LC-Rec's commands: a folder tells it")
    model.add_argument("--cf_model", help="where the collaborative model is now, if it has moved")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one the model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument(
        "--index_file", default=".index.json",
        help="suffix of the index file, or a path to one if it has a slash (default: %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--user_file", default=".user.json",
        help="suffix of the file of what users say, or a path to one (default: %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--test_task", default="SeqRec", choices=list(TEST_TASKS), type=task_of,
        help="what a model that generates is asked for: the next item, from indices or from titles (FusionSeqRec); "
        "what a user is looking for (default: %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--test_prompt_ids", default="0", help="phrasings: all, or numbers like 0,3 (default: %(default)s)"
    )
    data.add_argument(
        "--sample_num",
        type=int,
        default=-1,
        help="measure only the first n users, or n ratings drawn at random; -1: all",
    )
    data.add_argument(
        "--test_batch_size", type=int, default=32, help="users, or ratings, per batch (default: %(default)s)"
    )
    search = parser.add_argument_group("search (of a model that generates)")
    search.add_argument("--num_beams", type=int, default=20, help="width of the search (default: %(default)s)")
    search.add_argument(
        "--score_over", default="vocabulary", choices=SCORE_OVER,
        help="log-probabilities over the whole vocabulary, or over the legal tokens only (default: %(default)s)",
    )  # fmt: skip
    search.add_argument("--exclude_seen", action="store_true", help="take a user's own items out of the candidates")
    search.add_argument(
        "--filter_items", action="store_true", help="no effect, kept for LC-Rec's commands: only items are returned"
    )
    questions = parser.add_argument_group("questions (of a model that answers Yes or No)")
    questions.add_argument(
        "--cold_text_only", action="store_true",
        help="ask by titles alone where training knew nothing of the user or of the item",
    )  # fmt: skip
    results = parser.add_argument_group("results")
    results.add_argument("--metrics", default="hit@1,hit@5,hit@10,ndcg@5,ndcg@10", help="(default: %(default)s)")
    results.add_argument("--results_file", type=Path, help="default: results/<dataset>/<method>.json")
    results.add_argument("--predictions_file", type=Path, help="JSON lines, one a user and phrasing, or rating")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    """Measure; with the other processes where `test_ddp.py` has set them up."""
    args = parse_args()
    silence_third_party()
    if args.sample_num != -1 and args.sample_num < 1:
        raise InputError(f"--sample_num {args.sample_num}: should be 1 at least, or -1 for all")
    if args.test_batch_size < 1:
        raise InputError(f"--test_batch_size {args.test_batch_size}: should be 1 at least")
    if distributed.is_initialized():
        args.gpu_id = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and not 0 <= args.gpu_id < torch.cuda.device_count():
        raise InputError(f"--gpu_id {args.gpu_id}: this machine has {torch.cuda.device_count()} GPUs")
    record = read_record(args.ckpt_path)
    if record["method"] == "lcrec":
        test_search(args, record)
    else:
        test_preferences(args, record)


def test_search(args: argparse.Namespace, record: dict) -> None:
    """A model that generates the next item's index, beside two baselines that learn nothing."""
    started = time.monotonic()
    together = distributed.is_initialized()
    main_process = not together or distributed.get_rank() == 0
    log = print if main_process else lambda *_: None

    # ---- What to measure ----
    task = TEST_TASKS[args.test_task]
    dataset = open_indexed(args.ckpt_path, record, task, args.data_path, args.dataset, args.index_file)
    if task != "seqrec" and task not in record["tasks"]:
        raise InputError(f"{args.ckpt_path}: was not tuned on {task} (--tasks), so it cannot be tested on it")
    task = seqrec_task(record["targets"]) if task == "seqrec" else task
    metrics = parse_metrics(args.metrics)
    if args.num_beams < max(k for _, k in metrics):
        raise InputError(f"--num_beams {args.num_beams}: --metrics {args.metrics} needs lists at least that long")
    templates, answerable = phrasings_of(args.ckpt_path, record, task)
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, answerable)
    method = record["method"] if args.test_task == "SeqRec" else f"{record['method']}-{task}"
    results_file = results_file_of(args, dataset.name, method)

    texts = read_users(dataset, args.user_file) if task in USER_TASKS else None
    samples = held_out_samples(dataset, "test", task, record["max_his_len"], texts)
    if args.sample_num > 0:
        samples = samples.select(range(min(args.sample_num, len(samples))))
    users = list(samples["user"])
    if not users:
        raise InputError(f"{dataset.folder}: no user has what {args.test_task} asks; see python -m data.intentions")
    histories, targets = zip(*(dataset.split(user, "test") for user in users), strict=True)
    excluded = histories if args.exclude_seen else None
    log(f"{dataset.name}: {len(users):,} test users, {len(dataset.item_ids):,} items")
    if dataset.too_short:
        log(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out")
    if args.exclude_seen and (again := sum(t in h for h, t in zip(histories, targets, strict=True))):
        log(f"  {again:,} users had their target before: with --exclude_seen it counts as a miss")

    # ---- Model ----
    device = torch.device(f"cuda:{args.gpu_id}" if torch.cuda.is_available() else "cpu")
    model, tokenizer = loading.open_model(args.ckpt_path, record, device, args.base_model)
    token_ids = index_token_ids(tokenizer, dataset.index)
    trie = trie_of(token_ids, tokenizer, task)
    instructions = instructions_of(record, samples, dataset, tokenizer, {task: templates}, token_ids)
    loading.check_context_length(model, instructions.lengths(longest=True).max())

    # ---- Search, one phrasing after another ----
    found = {}
    for number in prompt_ids:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            found[number] = recommend(
                model,
                instructions,
                samples,
                templates[number],
                trie,
                args.num_beams,
                args.test_batch_size,
                excluded,
                args.score_over,
                split=together,
                show_progress=main_process,
            )
    if not main_process:
        return
    lists = {number: [[r.item for r in ranked] for ranked in each] for number, each in found.items()}
    by_prompt = {number: ranking_metrics(each, targets, metrics) for number, each in lists.items()}
    names = [f"{metric}@{k}" for metric, k in metrics]
    spread = {
        which: {name: of([result[name] for result in by_prompt.values()]) for name in names}
        for which, of in (("mean", lambda values: sum(values) / len(values)), ("min", min), ("max", max))
    }

    # ---- Baselines on the same users ----
    recommenders = fit_baselines(dataset)
    of_baselines = {
        name: [
            baseline.recommend(history, args.num_beams, set(history) if args.exclude_seen else set())
            for history in histories
        ]
        for name, baseline in recommenders.items()
    }
    baselines = {name: ranking_metrics(each, targets, metrics) for name, each in of_baselines.items()}

    # ---- Results ----
    write_json(
        results_file,
        {
            "test_task": args.test_task,
            "test_prompt_ids": prompt_ids,
            "mean_results": spread["mean"],
            "min_results": spread["min"],
            "max_results": spread["max"],
            "all_prompt_results": [by_prompt[number] for number in prompt_ids],
            "baselines": baselines,
            "users": len(users),
            "num_beams": args.num_beams,
            **run_metadata(vars(args), started),
        },
        indent=1,
    )
    if args.predictions_file:
        write_predictions(args.predictions_file, dataset, users, targets, found)
    rows = baselines | {method: spread["mean"]}
    if len(prompt_ids) > 1:
        rows |= {f"{method}, worst phrasing": spread["min"], f"{method}, best phrasing": spread["max"]}
    print_ranking(rows, names)
    print_examples(dataset, users, targets, histories, found[prompt_ids[0]])
    print(f"\nresults in {results_file}")

    # ---- The report ----
    popularity = recommenders["popularity"].counts
    evidence = next_item_details(dataset, method, users, histories, targets, lists, of_baselines, popularity)
    index_folder = dataset_file(dataset.folder, dataset.name, args.index_file).parent
    evidence["index"] = describe(dataset, index_folder, model.get_input_embeddings(), token_ids, popularity)
    evidence |= {"curves": training_curves(args.ckpt_path), "phrasings": [templates[at].prompt for at in prompt_ids]}
    print(f"report in {write_report(results_file, evidence)}")


def test_preferences(args: argparse.Namespace, record: dict) -> None:
    """A model that scores ratings: AUC and UAUC of all, warm and cold test ratings."""
    together = distributed.is_initialized()
    main_process = not together or distributed.get_rank() == 0
    asks = record["method"] in YES_NO_METHODS
    if not (asks or main_process):
        return  # seconds of work: the first process does it alone
    started = time.monotonic()

    # ---- Model and rows ----
    if asks:
        model, dataset = open_asked(
            args.ckpt_path, record, args.data_path, args.dataset, args.base_model, args.cf_model
        )
    else:
        model = load_collaborative(args.ckpt_path)
        dataset = open_ratings(args.data_path, args.dataset or record["dataset"])
        check_same_dataset(model, dataset)
    name = run_name(model, record["method"]) if asks else record["method"]
    results_file = results_file_of(args, dataset.name, name)
    part = sample_ratings(dataset.parts["test"], max(0, args.sample_num))
    if torch.cuda.is_available():
        model.to(f"cuda:{args.gpu_id}")

    # ---- Scores, one phrasing after another ----
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, range(len(record["prompts"]))) if asks else [None]
    tokenizer = load_tokenizer(args.ckpt_path) if asks else None
    scores = {}
    for number in prompt_ids:
        if asks:
            questions = questions_of(part, dataset, tokenizer, model, record, number, args.cold_text_only)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                scores[number] = ask(model, questions, args.test_batch_size, together, show_progress=main_process)
        else:
            scores[number] = score(model, model_inputs(part, model), args.test_batch_size)
    if not main_process:
        return

    # ---- Results ----
    found = {number: auc_metrics(part, each) for number, each in scores.items()}
    results = found[prompt_ids[0]]
    more = {"test_prompt_ids": prompt_ids, "all_prompt_results": list(found.values())} if asks else {}
    write_json(results_file, {**results, **more, **run_metadata(vars(args), started)}, indent=1)
    if args.predictions_file:
        columns = [to_numpy(part, name).tolist() for name in ("uid", "iid", "label")]
        with atomic_write(args.predictions_file) as temporary, temporary.open("w", encoding="utf-8") as file:
            for number, each in scores.items():
                for user, item, label, of_model in zip(*columns, each.tolist(), strict=True):
                    line = {"user": user, "item": item, "label": label, "prompt": number, "score": of_model}
                    file.write(json.dumps(line) + "\n")
    rows = {f"{name}, phrasing {number}" if len(found) > 1 else name: each for number, each in found.items()}
    print_table(rows)
    print(f"\nresults in {results_file}")
    log_odds = model.log_odds(scores[prompt_ids[0]].astype(np.float64))  # exact: what ranks alike ranks alike still
    evidence = yes_no_details(dataset.name, name, part, log_odds) | {"curves": training_curves(args.ckpt_path)}
    evidence["phrasings"] = [record["prompts"][at]["prompt"] for at in prompt_ids if asks]
    print(f"report in {write_report(results_file, evidence)}")


def results_file_of(args: argparse.Namespace, dataset: str, method: str) -> Path:
    """Where the results go; InputError, before anything is measured, if they or the predictions cannot be written."""
    results_file = args.results_file or Path("results") / dataset / f"{method}.json"
    for file in filter(None, (results_file, args.predictions_file)):
        output_file(file)
    return results_file


def parse_prompt_ids(given: str, there: Sequence[int]) -> list[int]:
    """The numbers of phrasings that `given` means, of those that are there to be asked with."""
    if given == "all":
        return list(there)
    numbers = given.split(",")
    if not all(number.strip().isdecimal() and int(number) in there for number in numbers):
        raise InputError(
            f"--test_prompt_ids {given}: should be all, or of {', '.join(map(str, there))}, separated by commas"
        )
    return [int(number) for number in numbers]


def write_predictions(
    path: Path, dataset: RecDataset, users: list[str], targets: list[str], found: dict[int, list[list[ScoredItem]]]
) -> None:
    """One line a user and phrasing, items best first; whoever doubts a number can recompute it."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, lists in found.items():
            for user, target, ranked in zip(users, targets, lists, strict=True):
                line = {"user": user, "prompt": number, "target": target, "items": [r.item for r in ranked]}
                line["indices"] = ["".join(dataset.index[r.item]) for r in ranked]
                line["scores"] = [round(r.score, 6) for r in ranked]
                file.write(json.dumps(line) + "\n")


def print_ranking(rows: dict[str, dict[str, float]], names: list[str]) -> None:
    width = max(map(len, rows))
    print("\n" + " " * width + "".join(f"{name:>10}" for name in names))
    for row, values in rows.items():
        print(f"{row:<{width}}" + "".join(f"{values[name]:>10.4f}" for name in names))


def print_examples(dataset: RecDataset, users, targets, histories, lists: list[list[ScoredItem]]) -> None:
    """Three users, spread over the list: the end of their history, the top five, and what they really took."""
    for at in sorted({0, len(users) // 2, len(users) - 1}):
        print(f"\nuser {users[at]} had {len(histories[at])} items, the last: {titles(dataset, histories[at][-5:])}")
        for place, recommendation in enumerate(lists[at][:5], start=1):
            mark = "   <- taken" if recommendation.item == targets[at] else ""
            print(f"  {place}. {dataset.title(recommendation.item)[:70]}{mark}")
        print(f"  taken: {dataset.title(targets[at])[:70]}")


def titles(dataset: RecDataset, items: list[str]) -> str:
    return "; ".join(dataset.title(item)[:50] for item in items)


if __name__ == "__main__":
    main()
