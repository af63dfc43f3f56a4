"""Print a health report of a dataset folder: counts, odd records, and what would be left out and why.

python -m data.check --dataset Industrial --data_path ~/datasets

It reads a next-item dataset (D.inter.json, D.item.json, D.index.json) or a ratings dataset (train.parquet, ...), and
changes nothing. The exit code is 0 whatever it finds, 2 if a file cannot be read.
"""

import argparse
from pathlib import Path

from data.health import check_histories
from data.health_ratings import check_ratings
from reclingua.datasets.formats import conversion_hint
from reclingua.utils.errors import InputError, cli_main, one_line_errors


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="name of the dataset (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    args = one_line_errors(parser).parse_args()
    folder = args.data_path / args.dataset
    if not folder.is_dir():
        raise InputError(f"{folder}: no such dataset folder; see --data_path")
    checks = {f"{args.dataset}.inter.json": check_histories, "train.parquet": check_ratings}
    reports = [check(folder, args.dataset) for file, check in checks.items() if (folder / file).is_file()]
    if not reports:
        hint = conversion_hint(folder, args.dataset) or "make one with python -m data.prepare"
        raise InputError(f"{folder}: has neither {' nor '.join(checks)}; {hint}")
    for report in reports:
        print(report.format())


if __name__ == "__main__":
    main()
