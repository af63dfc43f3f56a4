"""Flags of `data.prepare`, and their check."""

import argparse
import codecs
import math
from pathlib import Path

import pandas as pd

from data.columns import FLAGS, NAMES
from data.published import PUBLISHED
from data.readers import SOURCES
from data.values import MISSING, UNITS
from reclingua.utils.errors import InputError, one_line_errors

MONTHS = [10, 5, 5]  # the papers' for MovieLens-1M
CONTENT = {  # kind of column -> what it contains
    "user": "the user", "item": "the item", "time": "the time; none: the order of the lines is the order in time",
    "rating": "the rating or label", "items_id": "the item in the items file", "title": "the item's title",
    "description": "its description", "brand": "its brand", "categories": "its categories",
}  # fmt: skip


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `data.prepare`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=("sequential", "preference"), default="sequential",
        help="histories for next-item prediction, or likes and dislikes split by time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=sorted([*SOURCES, *PUBLISHED]), default="recbole",
        help="format of the raw files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--raw_path", type=Path,
        help="folder of the raw files; with --source csv file of ratings (default: example of the recbole package)",
    )  # fmt: skip
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument(
        "--min_interactions", type=int,
        help="k of the k-core of users and items, within the window (default: 5; 1 with --task preference)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="DAY",
        help="first day of the window, like 2001-06-01, UTC (default: all; with --task preference the last months)",
    )  # fmt: skip
    parser.add_argument(
        "--keep_ids", action="store_true",
        help="users and items in the id maps of an earlier preparation there keep their ids, new ones follow",
    )  # fmt: skip
    parser.add_argument("--memory_gb", type=float, default=4, help="memory limit of DuckDB, GB (default: %(default)s)")
    sequential = parser.add_argument_group("--task sequential")
    sequential.add_argument("--end", metavar="DAY", help="last day of the window (default: all)")
    preference = parser.add_argument_group("--task preference")
    preference.add_argument(
        "--months", type=float, nargs=3, default=MONTHS, metavar=("TRAIN", "VALID", "TEST"),
        help="months of each part; .5 is half the days of a month (default: 10 5 5, the papers' for MovieLens-1M)",
    )  # fmt: skip
    preference.add_argument(
        "--liked_above", type=float, help="ratings above this value are likes (default: 3; of labels 0 and 1 0.5)"
    )
    add_raw_flags(parser)
    return parser


def add_raw_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that state how values are written in the raw files, and where they are."""
    values = parser.add_argument_group("raw values")
    values.add_argument("--encoding", default="utf-8", help="encoding of the raw files (default: %(default)s)")
    values.add_argument(
        "--time_unit", choices=UNITS, help="unit of times that are numbers (default: s; ms with amazon2023)"
    )
    values.add_argument(
        "--time_format",
        help="format of times, such as %%d/%%m/%%Y %%H:%%M (default: a number, or an ISO 8601 date)",
    )
    values.add_argument(
        "--decimal", default=".", help="sign before the decimals of a number, one character (default: %(default)s)"
    )
    values.add_argument(
        "--na_values", nargs="*", default=list(MISSING), metavar="MARK",
        help="marks of a missing value, in any column (default: those of pandas, such as NaN, NULL, None, N/A)",
    )  # fmt: skip
    values.add_argument(
        "--max_bad_share", type=float, default=0.01,
        help="share of the lines of a file that can be left out because they cannot be used (default: %(default)s)",
    )  # fmt: skip
    columns = parser.add_argument_group("columns", "Names of columns or JSON fields")
    for kind, flag in FLAGS.items():
        names = ", ".join(NAMES[kind][:4]) + (", ..." if len(NAMES[kind]) > 4 else "")
        default = "as in the ratings, or id" if kind == "items_id" else f"the source's, or the first of {names}"
        columns.add_argument(flag, metavar="NAME", help=f"column of {CONTENT[kind]} (default: {default})")
    csv = parser.add_argument_group("--source csv", "Tables with a header, delimited by , ; | or tabs, .gz or not")
    csv.add_argument("--items_path", type=Path, help="file of item texts (default: no item texts)")


def parse_args(description: str | None) -> argparse.Namespace:
    """Return the checked arguments of `data.prepare`; InputError for those that contradict each other."""
    args = one_line_errors(build_parser(description)).parse_args()
    if args.min_interactions is not None and args.min_interactions < 1:
        raise InputError(f"--min_interactions {args.min_interactions}: should be at least 1")
    if not all(0 < months <= 240 for months in args.months):
        raise InputError(f"--months {' '.join(f'{months:g}' for months in args.months)}: should be above 0, up to 240")
    if not 0.1 <= args.memory_gb < 10_000:
        raise InputError(f"--memory_gb {args.memory_gb:g}: should be at least 0.1")
    if args.liked_above is not None and not math.isfinite(args.liked_above):
        raise InputError(f"--liked_above {args.liked_above:g}: should be a number")
    if not 0 <= args.max_bad_share < 1:
        raise InputError(f"--max_bad_share {args.max_bad_share:g}: should be from 0 to below 1")
    if len(args.decimal) != 1 or args.decimal.isalnum() or args.decimal in "+-^]\\":
        raise InputError(f"--decimal {args.decimal}: should be one character, such as a comma")
    try:
        args.encoding = codecs.lookup(args.encoding).name.removesuffix("-sig")
    except (LookupError, ValueError):
        raise InputError(f"--encoding {args.encoding}: no such encoding; try latin-1, cp1252 or utf-16") from None
    args.start, args.end = _parse_day("--start", args.start), _parse_day("--end", args.end)
    if args.raw_path is None and args.source != "recbole":
        raise InputError(
            f"--source {args.source} needs --raw_path, {'a file' if args.source == 'csv' else 'a folder'}"
        )
    if args.time_column == "none" and (args.task == "preference" or args.start or args.end):
        raise InputError("--time_column none: --task preference, --start and --end need times")
    if args.task == "preference" and args.end:
        raise InputError("--end has no effect with --task preference; see --months")
    if args.task == "preference" and args.source == "csv" and not args.items_path:
        raise InputError("--task preference needs item texts: give --items_path")
    if args.source in PUBLISHED:
        selection = {"--start": args.start, "--end": args.end, "--min_interactions": args.min_interactions}
        selection["--keep_ids"] = args.keep_ids or None
        if flag := next((flag for flag, value in selection.items() if value is not None), None):
            raise InputError(f"{flag} has no effect with --source {args.source}, a dataset that is taken as published")
    return args


def _parse_day(flag: str, text: str | None) -> pd.Timestamp | None:
    if text is None:
        return None
    day = pd.to_datetime(text, format="%Y-%m-%d", errors="coerce")
    if pd.isna(day) or day.year > 2200:
        raise InputError(f"{flag} {text}: should be a day, like 2001-06-01")
    return day
