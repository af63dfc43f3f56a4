"""Flags of test.py and of recommend.py."""

import argparse
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from reclingua.baselines import NEXT_ITEM_BASELINES
from reclingua.datasets.tasks import TEST_TASKS
from reclingua.decoding.beam_search import SCORE_OVER
from reclingua.inference.fusion import DEPTH
from reclingua.inference.shards import ENDINGS
from reclingua.utils.errors import InputError, one_line_errors
from reclingua.utils.hub import TRUST_HELP

INDEX_HELP = (
    "semantic IDs, those of the checkpoint and of new items: file suffix, or a path if it has a slash (default: those "
    "in the checkpoint)"
)


def test_task(name: str) -> str:
    """Return the test of that name, in whatever case."""
    return next((task for task in TEST_TASKS if task.lower() == name.lower()), name)


def build_test_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of test.py's flags; a bad flag raises InputError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input_flags(parser)
    _add_measuring_flags(parser)
    return one_line_errors(parser)


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt_path", type=Path, help="folder written by finetune.py or pretrain.py")
    model.add_argument(
        "--baselines_only", action="store_true", help="measure the baselines of --dataset alone, without a model"
    )
    model.add_argument("--gpu_id", type=int, default=0, help="GPU to use, where there is one (default: %(default)s)")
    model.add_argument("--base_model", help="base model of an adapter checkpoint, overrides the stored path")
    model.add_argument(
        "--bf16", type=string_to_bool, nargs="?", const=True,
        help="compute in bfloat16, weights keep their dtype (default: as the model was trained, but float32 on a "
        "device without instructions for bfloat16)",
    )  # fmt: skip
    model.add_argument(
        "--lora", action="store_true", help="ignored; detected from the checkpoint (LC-Rec compatibility)"
    )
    model.add_argument(
        "--cf_model",
        help="collaborative model of a checkpoint, overrides the stored path; of next items: a SASRec of pretrain.py, "
        "measured as a further baseline",
    )
    model.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name of the dataset (default: the one the model was tuned on)")
    data.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    data.add_argument("--index_file", help=INDEX_HELP)
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


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
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
    questions.add_argument(
        "--untuned", action="store_true", help="a further row: the base model before any tuning, asked by titles alone"
    )
    questions.add_argument(
        "--count_valid", action="store_true",
        help="like-rates count the valid ratings, too: all that is known before the test period",
    )  # fmt: skip
    baselines = parser.add_argument_group("baselines")
    baselines.add_argument(
        "--fuse",
        help="combine the model's scores with those of these baselines, separated by commas, as a further row: ease, "
        "co-occurrence, ...; of a model of ratings: like-rates. Weights are chosen on valid and stored beside the "
        "checkpoint",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--metrics",
        default="hit@1,hit@5,hit@10,ndcg@5,ndcg@10",
        help="hit@k and ndcg@k, separated by commas (default: %(default)s)",
    )
    results.add_argument("--results_file", type=Path, help="default: results/<dataset>/<name of --ckpt_path>.json")
    results.add_argument("--predictions_file", type=Path, help="JSON lines: one for each user or rating, and prompt")


def parse_fuse(args: argparse.Namespace) -> list[str]:
    """Return the names of the baselines that --fuse names, [] without it; InputError for one that there is not."""
    names = [name.strip() for name in args.fuse.split(",")] if args.fuse else []
    known = [*NEXT_ITEM_BASELINES, *(["sasrec"] if args.cf_model else [])]
    if unknown := next((name for name in names if name not in known), None):
        hint = "; sasrec needs --cf_model" if unknown == "sasrec" else ""
        raise InputError(f"--fuse {unknown}: should be of {', '.join(known)}, separated by commas{hint}")
    if len(set(names)) < len(names):
        raise InputError(f"--fuse {args.fuse}: names a baseline twice")
    if names and args.test_task != "SeqRec":
        raise InputError(f"--fuse: baselines read histories, so it needs --test_task SeqRec, not {args.test_task}")
    return names


# ---- recommend.py ----

RECOMMEND_INPUTS = ("histories", "candidates", "exclude_items", "pairs")  # flags of files
LIST_FLAGS = ("histories", "index_file", "candidates", "exclude_items", "exclude_seen", "num_beams", "item_to_item")


def build_recommend_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of recommend.py's flags; a bad flag raises InputError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="folder written by finetune.py or pretrain.py")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write; its ending is its format: .parquet, .jsonl or .csv"
    )
    parser.add_argument("--dataset", help="name of the dataset (default: the one the model was trained on)")
    parser.add_argument("--data_path", default="data", help="folder that holds <dataset>/ (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="users or pairs per batch (default: %(default)s)")
    parser.add_argument("--gpu_id", type=int, default=0, help="GPU to use without torchrun (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights keep their dtype")
    parser.add_argument("--base_model", help="base model of an adapter checkpoint, overrides the stored path")
    parser.add_argument("--cf_model", help="collaborative model of a checkpoint, overrides the stored path")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    parser.add_argument(
        "--fuse", action="store_true", help="rank or score by the fusion that test.py --fuse stored in the checkpoint"
    )
    lists = parser.add_argument_group("lists (next-item models)")
    lists.add_argument("--k", type=int, default=20, help="length of a list (default: %(default)s)")
    lists.add_argument(
        "--histories", type=Path,
        help="other users: .parquet, .jsonl or .csv with the columns user and items (default: all of the dataset)",
    )  # fmt: skip
    lists.add_argument("--index_file", help=INDEX_HELP)
    lists.add_argument("--candidates", type=Path, help="recommend these items only: a file with one id a line")
    lists.add_argument("--exclude_items", type=Path, help="never recommend these items: a file with one id a line")
    lists.add_argument("--exclude_seen", action="store_true", help="leave the user's own items out")
    lists.add_argument("--num_beams", type=int, help="beam width (default: 20, or --k if that is more)")
    lists.add_argument(
        "--item_to_item", action="store_true", help="for each item what follows a history of that item alone"
    )
    pairs = parser.add_argument_group("scores (Yes/No and collaborative models)")
    pairs.add_argument(
        "--pairs", type=Path, help="pairs to score: .parquet, .jsonl or .csv with the columns user and item"
    )
    return one_line_errors(parser)


def check_recommend_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags out of range or that exclude each other."""
    if args.output.suffix.lower() not in ENDINGS:
        raise InputError(f"--output {args.output}: should end in {', '.join(ENDINGS)}")
    if args.k < 1 or args.batch_size < 1:
        raise InputError(f"--k {args.k}, --batch_size {args.batch_size}: should be 1 at least")
    if args.num_beams is not None and args.num_beams < args.k:
        raise InputError(f"--num_beams {args.num_beams}: should be --k ({args.k}) at least")
    if args.fuse and args.num_beams is not None:
        raise InputError("--num_beams: --fuse searches as its weights were chosen; leave it out")
    if args.fuse and not args.pairs and args.k > DEPTH:
        raise InputError(f"--k {args.k}: a fusion ranks {DEPTH} items at least, so with --fuse it is {DEPTH} at most")
    if args.item_to_item and args.histories:
        raise InputError("--item_to_item: is of items, and --histories are of users; give one of them")
    if args.pairs and (other := next((flag for flag in LIST_FLAGS if getattr(args, flag)), None)):
        raise InputError(f"--pairs: makes no lists, so --{other} has no effect; leave one of them out")
