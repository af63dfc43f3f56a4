"""The report of a run, which test.py writes as well; or several runs side by side, and which differences are real.

python -m report results/ml-100k/lcrec.json                                    the report of one run, made again
python -m report results/ml-1m/tallrec.json results/ml-1m/collm-mf.json        runs on the same users, side by side

One run: results/D/lcrec/report.html, and its pictures beside it as PNG. Several: a table on the screen and
results/D/lcrec.compared.html beside the first. A page needs no network and no other file.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

from reclingua.reporting.compare import KINDS, check_alike, sections, tables
from reclingua.reporting.details import folder_of
from reclingua.reporting.html import Table, write_page
from reclingua.reporting.single_run import open_checked, write_report
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import output_file
from reclingua.utils.text import unique_names


def print_tables(*given: Table) -> None:
    for table in given:
        rows = [table.columns, *table.rows]
        widths = [max(len(row[at]) for row in rows) for at in range(len(table.columns))]
        print(f"\n{table.caption}")
        for name, *cells in rows:
            print(
                f"{name:<{widths[0]}}"
                + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            )


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files of test.py")
    parser.add_argument("--output", type=Path, help="the page (default: beside the first results file)")
    args = one_line_errors(parser).parse_args()
    if args.output:
        output_file(args.output)
    if len(args.results) == 1:
        print(f"report in {write_report(args.results[0], output=args.output)}")
        return
    if len(set(args.results)) < len(args.results):
        raise InputError("a results file is given twice; name each once")

    runs = dict(zip(unique_names(args.results), map(open_checked, args.results), strict=True))
    check_alike(list(runs.values()))
    metrics, compared, found = tables(runs)
    print_tables(metrics, compared)
    first = args.results[0]
    page = args.output or first.with_name(f"{folder_of(first).name}.compared.html")
    base = next(iter(runs.values()))
    title = f"{base.evidence['dataset']}: {', '.join(runs)}"
    facts = {name: run.file for name, run in runs.items()}
    write_page(page, title, KINDS[base.kind].summary(base), sections(runs, metrics, compared, found), facts)
    print(f"\n* the interval of the difference does not hold 0\nreport in {page}")


if __name__ == "__main__":
    main()
