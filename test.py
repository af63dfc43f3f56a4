"""Measure a model: hit rate and NDCG of next items, or AUC and UAUC of what test users liked.

The results file, results/D/lcrec.json, gets a report beside it, results/D/lcrec/report.html (see report.py). Every
result comes with baselines, whose settings are chosen on valid.

python test.py --dataset ml-100k --baselines_only --exclude_seen        what there is to beat, without any model
python test.py --ckpt_path ckpt/ml-100k/lcrec --dataset ml-100k --exclude_seen
python test.py --ckpt_path ckpt/ml-100k/lcrec --test_prompt_ids all --num_beams 20 --predictions_file out.jsonl
python test.py --ckpt_path ckpt/ml-1m/mf --dataset ml-1m --data_path ~/datasets
python test.py --ckpt_path ckpt/ml-1m/collm-mf --dataset ml-1m --data_path ~/datasets --cold_text_only
"""

from reclingua.utils.logging import silence_third_party

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import distributed

from reclingua import Recommender, Scorer
from reclingua.baselines import Baselines, fit_baselines
from reclingua.baselines.fusion import fused_alone, rank_by_all
from reclingua.baselines.rates import LikeRates
from reclingua.baselines.text_neighbours import TextNeighbours
from reclingua.datasets.interactions import InteractionDataset, open_interactions
from reclingua.datasets.ratings import open_ratings, sample_ratings
from reclingua.datasets.tasks import TEST_TASKS, USER_TASKS, held_out_samples
from reclingua.datasets.user_texts import read_user_texts
from reclingua.inference.arguments import build_test_parser, parse_fuse
from reclingua.inference.collaborative import auc_metrics, print_table
from reclingua.inference.fusion import fuse_targets
from reclingua.inference.loading import check_histories, check_ratings, load_metadata
from reclingua.inference.next_item_sasrec import NextItemSASRec
from reclingua.inference.predictions import write_rankings, write_scores
from reclingua.inference.rating_fusion import rating_rows, save_rating_fusion
from reclingua.metrics import metrics_of_ranks, parse_metrics, ranking_metrics
from reclingua.reporting.codebook import codebook_details
from reclingua.reporting.cold_items import cold_item_metrics, count_candidates, print_cold_items
from reclingua.reporting.console import print_examples, print_metrics, print_rows, print_users, summarize
from reclingua.reporting.details import check_result_files, next_item_details, training_curves, yes_no_details
from reclingua.reporting.single_run import write_report
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.files import write_json
from reclingua.utils.hub import trust_remote_code
from reclingua.utils.metadata import (
    METADATA_FILE,
    CheckpointMetadata,
    default_results_file,
    has_own_results,
    measured_checkpoint,
    run_metadata,
)
from reclingua.utils.precision import choose_bf16, has_bf16_instructions
from reclingua.utils.processes import claim_device

Rows = dict[str, dict[str, np.ndarray]]  # "baselines" and "fused" -> name -> rank of each target, score of each rating


@cli_main
def main() -> None:
    """Measure; with the other processes where `test_ddp.py` has made a process group."""
    args = build_test_parser(__doc__).parse_args()
    silence_third_party()
    trust_remote_code(args.trust_remote_code)
    if args.sample_num != -1 and args.sample_num < 1:
        raise InputError(f"--sample_num {args.sample_num}: should be 1 at least, or -1 for all")
    if args.test_batch_size < 1:
        raise InputError(f"--test_batch_size {args.test_batch_size}: should be 1 at least")
    device = claim_device(args.gpu_id)
    if args.baselines_only:
        test_baselines(args)
        return
    if args.ckpt_path is None:
        raise InputError("--ckpt_path: name a folder written by finetune.py or pretrain.py, or use --baselines_only")
    metadata = load_metadata(args.ckpt_path)
    args.bf16 = choose_bf16(args.bf16, metadata.bf16, has_bf16_instructions(torch.device(device).type))
    if metadata.method == "lcrec":
        test_next_item(args, metadata, device)
    else:
        test_ratings(args, metadata, device)


# ---- Next item ----


def test_next_item(args: argparse.Namespace, metadata: CheckpointMetadata, device: str) -> None:
    """Measure a model that generates the next item's semantic ID, beside baselines on the same users."""
    started = time.monotonic()
    task, metrics = TEST_TASKS[args.test_task], parse_metrics(args.metrics)
    if args.num_beams < max(k for _, k in metrics):
        raise InputError(f"--num_beams {args.num_beams}: --metrics {args.metrics} needs lists at least that long")
    fused_names = parse_fuse(args)
    method = metadata.method if args.test_task == "SeqRec" else f"{metadata.method}-{task}"
    where = {"dataset": args.dataset, "index_file": args.index_file, "base_model": args.base_model}
    recommender = Recommender.from_pretrained(args.ckpt_path, args.data_path, task=task, device=device, **where)
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, recommender.prompt_ids)

    # ---- Users ----
    samples, dataset = test_samples(args, recommender, task), recommender.dataset
    results_file = results_file_of(args, dataset.name, "" if args.test_task == "SeqRec" else task)
    users = list(samples["user"])
    histories, targets = zip(*(dataset.split(user, "test") for user in users), strict=True)
    relation = check_histories(args.ckpt_path, recommender.metadata, dataset, users, args.allow_other_histories)
    if is_main_process():
        print_users(dataset, histories, targets, largest_k(args) if args.exclude_seen else None, relation)
    baselines = fit_all_baselines(args, dataset) if fused_names or is_main_process() else None

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
        is_fused = bool(baselines and fused_names) and all(name in baselines.models for name in fused_names)
        if baselines and is_fused:
            fused, fused_ranks = fuse_targets(
                args.ckpt_path, recommender, baselines, fused_names, samples, histories, rankings[prompt_ids[0]],
                excludes_seen=args.exclude_seen, num_beams=args.num_beams, prompt_id=prompt_ids[0],
                score_over=args.score_over, batch_size=args.test_batch_size,
            )  # fmt: skip
    if not is_main_process() or not baselines:
        return

    # ---- Metrics, of the baselines as well ----
    lists = {key: [[scored.item for scored in ranked] for ranked in ranking] for key, ranking in rankings.items()}
    by_prompt = {prompt_id: ranking_metrics(items, targets, metrics) for prompt_id, items in lists.items()}
    baseline_ranks, fusion = rank_by_all(
        dataset, baselines, histories, targets, args.num_beams, args.exclude_seen, fused_alone(fused_names)
    )
    fusions = {fusion.name: fusion.describe()} if fusion else {}
    rows: Rows = {"baselines": baseline_ranks, "fused": {}}
    if is_fused:
        rows["fused"], fusions[fused.name] = {fused.name: fused_ranks}, asdict(fused.settings)
        print(fused.describe())
    row_metrics = measure_rows(rows, lambda ranks: metrics_of_ranks(ranks, metrics))

    # ---- Results and report ----
    about: dict[str, Any] = {"users": len(users), "histories": relation}
    details = next_item_details(dataset, method, users, histories, targets, lists, baselines.popularity, rows)
    num_candidates = count_candidates(dataset, histories, targets, args.exclude_seen)
    about |= {"cold_items": cold_item_metrics(details, num_candidates, metrics)}
    more = {**row_metrics, "baseline_settings": baselines.describe(), "fusions": fusions, **about}
    write_next_item_results(args, results_file, by_prompt, more, started)
    if args.predictions_file:
        write_rankings(args.predictions_file, dataset, users, targets, rankings)
    print_metrics(method, by_prompt, row_metrics["baselines"], row_metrics["fused"])
    print_cold_items(about["cold_items"])
    print_examples(dataset, users, targets, histories, lists[prompt_ids[0]])
    print(f"\nresults in {results_file}")
    folder = dataset.file_path(args.index_file or "").parent
    embeddings, token_ids = recommender.model.get_input_embeddings(), recommender.token_ids
    details |= {
        "index": codebook_details(dataset, folder, embeddings, token_ids, baselines.popularity),
        "worth": [fused.name, fusion.name] if is_fused and fusion else [],
        "curves": training_curves(args.ckpt_path),
        "prompts": [recommender.templates[prompt_id].prompt for prompt_id in prompt_ids],
    }
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


def fit_all_baselines(args: argparse.Namespace, dataset: InteractionDataset) -> Baselines:
    """Fit the baselines of next items, and load the SASRec of --cf_model as a further one.

    Where test targets have no training interactions, text neighbours are one, too.
    """
    baselines = fit_baselines(dataset, args.exclude_seen)
    if args.cf_model:
        sasrec = NextItemSASRec.from_pretrained(Path(args.cf_model), dataset, baselines.catalogue)
        baselines.models["sasrec"] = sasrec
    if dataset.items and any(baselines.popularity[dataset.split(user, "test")[1]] == 0 for user in dataset.test_users):
        neighbours = TextNeighbours([dataset.text(item) for item in baselines.catalogue.items])
        baselines.models[neighbours.name] = neighbours
    if is_main_process():
        for name, reason in baselines.left_out.items():
            print(f"{name} is left out, and so is its fusion: {reason}")
    return baselines


def write_next_item_results(
    args: argparse.Namespace,
    results_file: Path,
    by_prompt: dict[int, dict[str, float]],
    more: dict[str, object],
    started: float,
) -> None:
    """Write the results file: LC-Rec's keys and `more`."""
    content = {
        "test_task": args.test_task,
        "test_prompt_ids": list(by_prompt),
        **{f"{name}_results": metrics for name, metrics in summarize(by_prompt).items()},
        "all_prompt_results": list(by_prompt.values()),
        **more,
        "num_beams": args.num_beams,
        **run_metadata(vars(args), started),
    }
    write_json(results_file, content, indent=1)


# ---- Ratings ----


def test_ratings(args: argparse.Namespace, metadata: CheckpointMetadata, device: str) -> None:
    """Measure a model that scores ratings: AUC and UAUC of all, warm and cold test ratings."""
    is_yes_no = bool(metadata.prompts)
    if not (is_yes_no or is_main_process()):
        return  # a collaborative model takes seconds: the first process measures it alone
    started = time.monotonic()
    scorer = Scorer.from_pretrained(
        args.ckpt_path,
        args.data_path,
        dataset=args.dataset,
        base_model=args.base_model,
        cf_model=args.cf_model,
        device=device,
    )
    dataset, name = scorer.dataset, scorer.name
    if args.fuse not in (None, "like-rates"):
        raise InputError(f"--fuse {args.fuse}: a model of ratings is fused with like-rates")
    results_file = results_file_of(args, dataset.name)
    part = sample_ratings(dataset.parts["test"], max(0, args.sample_num))
    relation = check_ratings(args.ckpt_path, metadata, dataset, part, args.allow_other_histories)
    prompt_ids = parse_prompt_ids(args.test_prompt_ids, range(len(scorer.templates))) if is_yes_no else [None]

    # ---- Scores, one prompt after another ----
    options = {"batch_size": args.test_batch_size, "show_progress": True}
    scores, num_truncated = {}, []
    with torch.autocast(scorer.model.device.type, torch.bfloat16, enabled=args.bf16 and is_yes_no):
        for prompt_id in prompt_ids:
            scores[prompt_id] = scorer.score(part, prompt_id=prompt_id, cold_text_only=args.cold_text_only, **options)
            num_truncated.append(scorer.num_truncated)
        untuned = scorer.untuned().score(part, **options) if args.untuned else None
        valid = None
        if args.fuse:
            valid_part = sample_ratings(dataset.parts["valid"], max(0, args.sample_num))
            of_valid = scorer.score(valid_part, prompt_id=prompt_ids[0], cold_text_only=args.cold_text_only, **options)
            valid = valid_part, scorer.model.log_odds(of_valid.astype(np.float64))
    if not is_main_process():
        return

    # ---- Results and report ----
    metrics = {prompt_id: auc_metrics(part, values) for prompt_id, values in scores.items()}
    by_prompt = {"test_prompt_ids": prompt_ids, "all_prompt_results": list(metrics.values())} if is_yes_no else {}
    by_prompt |= {"num_truncated": num_truncated} if is_yes_no else {}
    log_odds = scorer.model.log_odds(scores[prompt_ids[0]].astype(np.float64))  # keeps the order, ties included
    rows, fusion = rating_rows(scorer, part, log_odds, valid, args.count_valid)
    if untuned is not None:
        rows["baselines"] = {"untuned": untuned.astype(np.float64), **rows["baselines"]}
    if fusion:
        how = {"cold_text_only": args.cold_text_only, "counts_valid": args.count_valid}
        fusion = replace(fusion, prompt_id=prompt_ids[0] or 0, **how)
        shown = ", ".join(f"{source} {weight:.3f}" for source, weight in fusion.weights.items())
        print(f"fusion: weights {shown}, fitted on valid, in {save_rating_fusion(args.ckpt_path, dataset, fusion)}")
    row_metrics = measure_rows(rows, lambda values: auc_metrics(part, values))
    content = {**metrics[prompt_ids[0]], **by_prompt, **row_metrics, "ratings": relation}
    write_json(results_file, content | run_metadata(vars(args), started), indent=1)
    if args.predictions_file:
        write_scores(args.predictions_file, part, scores)
    if max(num_truncated):
        print(f"{max(num_truncated):,} of {len(part):,} prompts are too long: their oldest titles are left out")
    table = {f"{name}, prompt {key}" if len(metrics) > 1 else name: value for key, value in metrics.items()}
    print_table({**row_metrics["baselines"], **table, **row_metrics["fused"]})
    print(f"\nresults in {results_file}")
    details = yes_no_details(dataset.name, name, part, log_odds, rows) | {"curves": training_curves(args.ckpt_path)}
    details["worth"] = [*rows["fused"], *list(rows["baselines"])[-1:]] if args.fuse else []
    details["prompts"] = [scorer.templates[prompt_id].prompt for prompt_id in prompt_ids if is_yes_no]
    print(f"report in {write_report(results_file, details)}")


# ---- Baselines alone ----


def test_baselines(args: argparse.Namespace) -> None:
    """Measure all baselines of a dataset: of next items, of ratings, or of both if its folder has both."""
    started = time.monotonic()
    if not args.dataset or args.ckpt_path:
        raise InputError("--baselines_only: name the data by --dataset, and no --ckpt_path")
    if not is_main_process():
        return
    results_file = results_file_of(args, args.dataset)
    folder, content = Path(args.data_path) / args.dataset, {}
    has_ratings = (folder / "train.parquet").exists()
    if (folder / f"{args.dataset}.inter.json").exists() or not has_ratings:
        dataset, metrics = open_interactions(args.data_path, args.dataset), parse_metrics(args.metrics)
        users = dataset.test_users[: args.sample_num if args.sample_num > 0 else None]
        histories, targets = zip(*(dataset.split(user, "test") for user in users), strict=True)
        print_users(dataset, histories, targets, largest_k(args) if args.exclude_seen else None)
        baselines = fit_all_baselines(args, dataset)
        ranks, fusion = rank_by_all(dataset, baselines, histories, targets, args.num_beams, args.exclude_seen)
        results = {name: metrics_of_ranks(ranks_of, metrics) for name, ranks_of in ranks.items()}
        content["next_item"] = {
            "baselines": results,
            "baseline_settings": baselines.describe(),
            "fusions": {fusion.name: fusion.describe()} if fusion else {},
            "users": len(users),
        }
        print_rows(results)
    if has_ratings:
        ratings = open_ratings(args.data_path, args.dataset)
        part = sample_ratings(ratings.parts["test"], max(0, args.sample_num))
        scores = LikeRates(ratings, args.count_valid).scores(part)
        content["ratings"] = {"baselines": {name: auc_metrics(part, values) for name, values in scores.items()}}
        print_table(content["ratings"]["baselines"])
    write_json(results_file, content | run_metadata(vars(args), started), indent=1)
    print(f"\nresults in {results_file}")


# ---- Both ----


def measure_rows(rows: Rows, measure: Callable[[np.ndarray], dict]) -> dict[str, dict[str, dict]]:
    """Return the metrics of each row, `measure` of its ranks or scores."""
    return {part: {name: measure(values) for name, values in named.items()} for part, named in rows.items()}


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def largest_k(args: argparse.Namespace) -> int:
    """Return the largest k of --metrics."""
    return max(k for _, k in parse_metrics(args.metrics))


def results_file_of(args: argparse.Namespace, dataset: str, task: str = "") -> Path:
    """Return where results go, before anything is measured.

    Raises:
        InputError: an output file cannot be written; the default one has results of another checkpoint.
    """
    if args.baselines_only:
        results_file = args.results_file or Path("results") / dataset / "baselines.json"
        check_result_files(results_file, args.predictions_file, {})
        return results_file
    results_file = args.results_file or default_results_file(args.ckpt_path, dataset, task)
    inputs = {f"{name} of --ckpt_path": args.ckpt_path / name for name in (METADATA_FILE, "config.json", "run.json")}
    inputs |= {f"--{flag}": Path(file) for flag in ("index_file", "user_file") if (file := getattr(args, flag))}
    check_result_files(results_file, args.predictions_file, inputs)
    is_given = args.results_file is not None and results_file.exists() and results_file.stat().st_size > 0
    if (is_given or not args.results_file and has_own_results(results_file, args.ckpt_path)) and is_main_process():
        measured = measured_checkpoint(results_file) or "another test"
        print(f"{results_file}: earlier results of {measured} will be replaced")
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
