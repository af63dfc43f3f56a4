"""Measure a model: hit rate and NDCG of next items, or AUC and UAUC of what test users liked.

The results file, results/D/lcrec.json, gets a report beside it, results/D/lcrec/report.html (see report.py).

python test.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --exclude_seen
python test.py --ckpt_path ckpt/ml-100k/lcrec --test_prompt_ids all --num_beams 20 --predictions_file out.jsonl
python test.py --ckpt_path ckpt/ml-1m/mf --dataset ml-1m --data_path ~/datasets
python test.py --ckpt_path ckpt/ml-1m/collm-mf --dataset ml-1m --data_path ~/datasets --cold_text_only
"""

from reclingua.utils.logging import silence_third_party

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import distributed

from reclingua import Recommender, Scorer
from reclingua.baselines import fit_baselines
from reclingua.datasets.interactions import InteractionDataset, dataset_file
from reclingua.datasets.ratings import sample_ratings
from reclingua.datasets.tasks import TEST_TASKS, USER_TASKS, held_out_samples
from reclingua.datasets.user_texts import read_user_texts
from reclingua.decoding.beam_search import SCORE_OVER, ScoredItem
from reclingua.inference.collaborative import auc_metrics, print_table
from reclingua.inference.loading import check_histories, check_ratings, load_metadata
from reclingua.inference.predictions import write_rankings, write_scores
from reclingua.metrics import parse_metrics, ranking_metrics
from reclingua.models.registry import YES_NO_METHODS
from reclingua.reporting.codebook import codebook_details
from reclingua.reporting.details import check_result_files, next_item_details, training_curves, yes_no_details
from reclingua.reporting.single_run import write_report
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import write_json
from reclingua.utils.hub import TRUST_HELP, trust_remote_code
from reclingua.utils.metadata import (
    METADATA_FILE,
    CheckpointMetadata,
    default_results_file,
    has_own_results,
    run_metadata,
)


def test_task(name: str) -> str:
    """Return the test of that name, in whatever case."""
    return next((task for task in TEST_TASKS if task.lower() == name.lower()), name)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt_path", type=Path, required=True, help="folder written by finetune.py or pretrain.py")
    model.add_argument("--gpu_id", type=int, default=0, help="GPU to use, where there is one (default: %(default)s)")
    model.add_argument("--base_model", help="base model of an adapter checkpoint, overrides the stored path")
    model.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights keep their dtype")
    model.add_argument(
        "--lora", action="store_true", help="ignored; detected from the checkpoint (LC-Rec compatibility)"
    )
    model.add_argument("--cf_model", help="collaborative model of a checkpoint, overrides the stored path")
    model.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one the model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument(
        "--index_file",
        help="semantic IDs: file suffix, or a path if it has a slash (default: those in the checkpoint)",
    )  # fmt: skip
    data.add_argument(
        "--user_file", default=".user.json",
        help="user texts (preferences, intentions): file suffix or path (default: %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--test_task", default="SeqRec", choices=list(TEST_TASKS), type=test_task,
        help="of a next-item model: SeqRec (history of semantic IDs), FusionSeqRec (history of titles), ItemSearch "
        "(a user's intention); default: %(default)s",
    )  # fmt: skip
    data.add_argument(
        "--test_prompt_ids", default="0", help="prompts: all, or numbers like 0,3 (default: %(default)s)"
    )
    data.add_argument(
        "--sample_num",
        type=int,
        default=-1,
        help="measure only the first n users, or up to n ratings drawn at random (8 of a user at most); -1: all "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--test_batch_size", type=int, default=32, help="users or ratings per batch (default: %(default)s)"
    )
    data.add_argument(
        "--allow_other_histories", action="store_true",
        help="measure although test targets can be interactions that the model was trained on",
    )  # fmt: skip
    search = parser.add_argument_group("beam search (next-item models)")
    search.add_argument("--num_beams", type=int, default=20, help="beam width (default: %(default)s)")
    search.add_argument(
        "--score_over", default="vocabulary", choices=SCORE_OVER,
        help="normalize log-probabilities over the whole vocabulary or over the tokens that the trie allows "
        "(default: %(default)s)",
    )  # fmt: skip
    search.add_argument("--exclude_seen", action="store_true", help="leave the user's own items out of the candidates")
    search.add_argument(
        "--filter_items", action="store_true", help="ignored; only items are ever returned (LC-Rec compatibility)"
    )
    questions = parser.add_argument_group("ratings (Yes/No models)")
    questions.add_argument(
        "--cold_text_only", action="store_true",
        help="ask by titles alone where training knew nothing of the user or of the item",
    )  # fmt: skip
    results = parser.add_argument_group("results")
    results.add_argument(
        "--metrics",
        default="hit@1,hit@5,hit@10,ndcg@5,ndcg@10",
        help="hit@k and ndcg@k, separated by commas (default: %(default)s)",
    )
    results.add_argument("--results_file", type=Path, help="default: results/<dataset>/<name of --ckpt_path>.json")
    results.add_argument("--predictions_file", type=Path, help="JSON lines: one for each user or rating, and prompt")
    return one_line_errors(parser).parse_args()


@cli_main
def main() -> None:
    """Measure; with the other processes where `test_ddp.py` has made a process group."""
    args = parse_args()
    silence_third_party()
    trust_remote_code(args.trust_remote_code)
    if args.sample_num != -1 and args.sample_num < 1:
        raise InputError(f"--sample_num {args.sample_num}: should be 1 at least, or -1 for all")
    if args.test_batch_size < 1:
        raise InputError(f"--test_batch_size {args.test_batch_size}: should be 1 at least")
    if distributed.is_initialized():
        args.gpu_id = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and not 0 <= args.gpu_id < torch.cuda.device_count():
        raise InputError(f"--gpu_id {args.gpu_id}: this machine has {torch.cuda.device_count()} GPUs")
    metadata = load_metadata(args.ckpt_path)
    if metadata.method == "lcrec":
        test_next_item(args, metadata)
    else:
        test_ratings(args, metadata)


# ---- Next item ----


def test_next_item(args: argparse.Namespace, metadata: CheckpointMetadata) -> None:
    """Measure a model that generates the next item's semantic ID, beside baselines on the same users."""
    started = time.monotonic()
    task, metrics = TEST_TASKS[args.test_task], parse_metrics(args.metrics)
    if args.num_beams < max(k for _, k in metrics):
        raise InputError(f"--num_beams {args.num_beams}: --metrics {args.metrics} needs lists at least that long")
    method = metadata.method if args.test_task == "SeqRec" else f"{metadata.method}-{task}"
    recommender = Recommender.from_pretrained(
        args.ckpt_path,
        args.data_path,
        dataset=args.dataset,
        index_file=args.index_file,
        task=task,
        base_model=args.base_model,
        device=device_of(args),
    )
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, recommender.prompt_ids)

    # ---- Users ----
    samples, dataset = test_samples(args, recommender, task), recommender.dataset
    results_file = results_file_of(args, dataset.name, "" if args.test_task == "SeqRec" else task)
    users = list(samples["user"])
    histories, targets = zip(*(dataset.split(user, "test") for user in users), strict=True)
    relation = check_histories(args.ckpt_path, recommender.metadata, dataset, users, args.allow_other_histories)
    log_users(args, dataset, histories, targets, relation)

    # ---- Search, one prompt after another ----
    excluded = histories if args.exclude_seen else None
    prompts = {prompt_id: recommender.encode(samples, prompt_id) for prompt_id in prompt_ids}
    with torch.autocast(recommender.model.device.type, torch.bfloat16, enabled=args.bf16):
        rankings = {
            prompt_id: recommender.search(
                encoded, args.num_beams, excluded, args.test_batch_size, args.score_over, show_progress=True
            )
            for prompt_id, encoded in prompts.items()
        }
    if not is_main_process():
        return

    # ---- Metrics, of the baselines as well ----
    lists = {prompt_id: [items_of(ranked) for ranked in ranking] for prompt_id, ranking in rankings.items()}
    by_prompt = {prompt_id: ranking_metrics(items, targets, metrics) for prompt_id, items in lists.items()}
    baselines = fit_baselines(dataset)
    baseline_lists = {
        name: [
            baseline.recommend(history, args.num_beams, set(history) if args.exclude_seen else set())
            for history in histories
        ]
        for name, baseline in baselines.items()
    }
    baseline_metrics = {name: ranking_metrics(items, targets, metrics) for name, items in baseline_lists.items()}

    # ---- Results and report ----
    about = {"users": len(users), "histories": relation}
    write_next_item_results(args, results_file, by_prompt, baseline_metrics, about, started)
    if args.predictions_file:
        write_rankings(args.predictions_file, dataset, users, targets, rankings)
    print_metrics(method, by_prompt, baseline_metrics)
    print_examples(dataset, users, targets, histories, rankings[prompt_ids[0]])
    print(f"\nresults in {results_file}")
    popularity = baselines["popularity"].counts
    details = next_item_details(dataset, method, users, histories, targets, lists, baseline_lists, popularity)
    folder = dataset_file(dataset.folder, dataset.name, args.index_file or "").parent
    embeddings = recommender.model.get_input_embeddings()
    details["index"] = codebook_details(dataset, folder, embeddings, recommender.token_ids, popularity)
    details["curves"] = training_curves(args.ckpt_path)
    details["prompts"] = [recommender.templates[prompt_id].prompt for prompt_id in prompt_ids]
    print(f"report in {write_report(results_file, details)}")


def test_samples(args: argparse.Namespace, recommender: Recommender, task: str) -> Dataset:
    """Return the samples of the test users that can be asked, the first --sample_num of them."""
    dataset = recommender.dataset
    texts = read_user_texts(dataset, args.user_file) if task in USER_TASKS else None
    samples = held_out_samples(dataset, "test", recommender.task, recommender.metadata.max_his_len, texts)
    if args.sample_num > 0:
        samples = samples.select(range(min(args.sample_num, len(samples))))
    if not len(samples):
        raise InputError(
            f"{dataset.folder}: no user has the texts that {args.test_task} needs; see python -m data.intentions"
        )
    return samples


def log_users(
    args: argparse.Namespace, dataset: InteractionDataset, histories: Sequence, targets: Sequence[str], relation: str
) -> None:
    """Print how many users are measured, and who is left out."""
    if not is_main_process():
        return
    print(f"{dataset.name}: {len(targets):,} test users, {len(dataset.item_ids):,} items; histories {relation}")
    if dataset.too_short:
        print(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out")
    repeated = sum(target in history for history, target in zip(histories, targets, strict=True))
    if args.exclude_seen and repeated:
        print(f"  {repeated:,} users had their target before: with --exclude_seen it counts as a miss")
    num_left = np.array([len(dataset.item_ids) - len({*history}) for history in histories])
    k = max(k for _, k in parse_metrics(args.metrics))
    if args.exclude_seen and (empty := (num_left == 0).sum()):
        print(f"  {empty:,} users had every item: no item is left to recommend, which counts as a miss")
    if args.exclude_seen and (few := ((0 < num_left) & (num_left <= k)).sum()):
        print(f"  {few:,} users have at most {k} items left: a list of {k} has their target, whatever the model")


def items_of(ranked: list[ScoredItem]) -> list[str]:
    """Return the items of a list without their scores."""
    return [scored.item for scored in ranked]


def summarize(by_prompt: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the metrics over all prompts: "mean", "min" and "max"."""
    names = next(iter(by_prompt.values()))
    values = {name: [metrics[name] for metrics in by_prompt.values()] for name in names}
    return {
        "mean": {name: sum(numbers) / len(numbers) for name, numbers in values.items()},
        "min": {name: min(numbers) for name, numbers in values.items()},
        "max": {name: max(numbers) for name, numbers in values.items()},
    }


def write_next_item_results(
    args: argparse.Namespace,
    results_file: Path,
    by_prompt: dict[int, dict[str, float]],
    baselines: dict[str, dict[str, float]],
    about: dict[str, object],
    started: float,
) -> None:
    """Write the results file, with LC-Rec's keys; `about` has further ones."""
    content = {
        "test_task": args.test_task,
        "test_prompt_ids": list(by_prompt),
        **{f"{name}_results": metrics for name, metrics in summarize(by_prompt).items()},
        "all_prompt_results": list(by_prompt.values()),
        "baselines": baselines,
        **about,
        "num_beams": args.num_beams,
        **run_metadata(vars(args), started),
    }
    write_json(results_file, content, indent=1)


def print_metrics(method: str, by_prompt: dict[int, dict[str, float]], baselines: dict[str, dict[str, float]]) -> None:
    """Print the metrics of the model, and its worst and best prompt where there are several, below the baselines."""
    summary = summarize(by_prompt)
    rows = baselines | {method: summary["mean"]}
    if len(by_prompt) > 1:
        rows |= {f"{method}, worst prompt": summary["min"], f"{method}, best prompt": summary["max"]}
    width = max(map(len, rows))
    print("\n" + " " * width + "".join(f"{name:>10}" for name in summary["mean"]))
    for row, metrics in rows.items():
        print(f"{row:<{width}}" + "".join(f"{value:>10.4f}" for value in metrics.values()))


def print_examples(
    dataset: InteractionDataset,
    users: list[str],
    targets: Sequence[str],
    histories: Sequence,
    lists: list[list[ScoredItem]],
) -> None:
    """Print three users, spread over the list: the end of the history, the five best items, the item taken."""
    for row in sorted({0, len(users) // 2, len(users) - 1}):
        recent = "; ".join(dataset.title(item)[:50] for item in histories[row][-5:])
        print(f"\nuser {users[row]} had {len(histories[row])} items, the last: {recent}")
        for rank, scored in enumerate(lists[row][:5], start=1):
            mark = "   <- taken" if scored.item == targets[row] else ""
            print(f"  {rank}. {dataset.title(scored.item)[:70]}{mark}")
        print(f"  taken: {dataset.title(targets[row])[:70]}")


# ---- Ratings ----


def test_ratings(args: argparse.Namespace, metadata: CheckpointMetadata) -> None:
    """Measure a model that scores ratings: AUC and UAUC of all, warm and cold test ratings."""
    is_yes_no = metadata.method in YES_NO_METHODS
    if not (is_yes_no or is_main_process()):
        return  # a collaborative model takes seconds: the first process measures it alone
    started = time.monotonic()
    scorer = Scorer.from_pretrained(
        args.ckpt_path,
        args.data_path,
        dataset=args.dataset,
        base_model=args.base_model,
        cf_model=args.cf_model,
        device=device_of(args),
    )
    dataset, name = scorer.dataset, scorer.name
    results_file = results_file_of(args, dataset.name)
    part = sample_ratings(dataset.parts["test"], max(0, args.sample_num))
    relation = check_ratings(args.ckpt_path, metadata, dataset, part, args.allow_other_histories)
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, range(len(scorer.templates))) if is_yes_no else [None]

    # ---- Scores, one prompt after another ----
    options = {"batch_size": args.test_batch_size, "show_progress": True, "cold_text_only": args.cold_text_only}
    scores, num_truncated = {}, []
    with torch.autocast(scorer.model.device.type, torch.bfloat16, enabled=args.bf16 and is_yes_no):
        for prompt_id in prompt_ids:
            scores[prompt_id] = scorer.score(part, prompt_id=prompt_id, **options)
            num_truncated.append(scorer.num_truncated)
    if not is_main_process():
        return

    # ---- Results and report ----
    metrics = {prompt_id: auc_metrics(part, values) for prompt_id, values in scores.items()}
    by_prompt = {"test_prompt_ids": prompt_ids, "all_prompt_results": list(metrics.values())} if is_yes_no else {}
    by_prompt |= {"num_truncated": num_truncated} if is_yes_no else {}
    content = {**metrics[prompt_ids[0]], **by_prompt, "ratings": relation, **run_metadata(vars(args), started)}
    write_json(results_file, content, indent=1)
    if args.predictions_file:
        write_scores(args.predictions_file, part, scores)
    if max(num_truncated):
        print(f"{max(num_truncated):,} of {len(part):,} prompts are too long: their oldest titles are left out")
    print_table({f"{name}, prompt {key}" if len(metrics) > 1 else name: value for key, value in metrics.items()})
    print(f"\nresults in {results_file}")
    # In float64 log-odds keep the order of the scores, ties included.
    log_odds = scorer.model.log_odds(scores[prompt_ids[0]].astype(np.float64))
    details = yes_no_details(dataset.name, name, part, log_odds) | {"curves": training_curves(args.ckpt_path)}
    details["prompts"] = [scorer.templates[prompt_id].prompt for prompt_id in prompt_ids if is_yes_no]
    print(f"report in {write_report(results_file, details)}")


# ---- Both ----


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def device_of(args: argparse.Namespace) -> str:
    """Return the device of --gpu_id, or the CPU."""
    return f"cuda:{args.gpu_id}" if torch.cuda.is_available() else "cpu"


def results_file_of(args: argparse.Namespace, dataset: str, task: str = "") -> Path:
    """Return where results go, before anything is measured.

    Raises:
        InputError: an output file cannot be written; the default one has results of another checkpoint.
    """
    results_file = args.results_file or default_results_file(args.ckpt_path, dataset, task)
    inputs = {f"{name} of --ckpt_path": args.ckpt_path / name for name in (METADATA_FILE, "config.json", "run.json")}
    inputs |= {f"--{flag}": Path(file) for flag in ("index_file", "user_file") if (file := getattr(args, flag))}
    check_result_files(results_file, args.predictions_file, inputs)
    if not args.results_file and has_own_results(results_file, args.ckpt_path) and is_main_process():
        print(f"{results_file}: earlier results of this checkpoint will be replaced")
    return results_file


def parse_prompt_ids(text: str, prompt_ids: Sequence[int]) -> list[int]:
    """Return the numbers of prompts that --test_prompt_ids names, of those that exist."""
    if text == "all":
        return list(prompt_ids)
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) in prompt_ids for number in numbers):
        known = ", ".join(map(str, prompt_ids))
        raise InputError(f"--test_prompt_ids {text}: should be all, or of {known}, separated by commas")
    return list(dict.fromkeys(map(int, numbers)))


if __name__ == "__main__":
    main()
