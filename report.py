"""Report of a run, which test.py writes as well, or a comparison of several runs on the same users.

python -m report results/ml-100k/lcrec.json                                    write the report of one run again
python -m report results/ml-1m/tallrec.json results/ml-1m/collm-mf.json        compare runs

Both print their metrics. One run: results/D/lcrec/report.html, with its plots as PNG beside it. Several runs:
results/D/lcrec.compared.html beside the first results file. Differences to the first run whose 95% bootstrap interval
excludes 0 are marked significant (*), not corrected for multiple comparisons. A page needs no network and no other
file.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

from reclingua.reporting.baselines import baseline_tables
from reclingua.reporting.bootstrap import SIGNIFICANCE_NOTE
from reclingua.reporting.compare import KINDS, check_comparable, comparison_sections, comparison_tables
from reclingua.reporting.details import DETAILS_FILE, report_folder
from reclingua.reporting.html import Table, write_page
from reclingua.reporting.single_run import load_checked_run, write_report
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import check_outputs, output_file
from reclingua.utils.text import unique_names

MAX_WIDTH = 120  # of a printed table


def print_table(table: Table) -> None:
    """Print a table with aligned columns, below each other those that one line of MAX_WIDTH does not hold."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    print(f"\n{table.caption}")
    start = 1
    while start < len(widths):
        end = start + 1
        while end < len(widths) and widths[0] + sum(2 + width for width in widths[start : end + 1]) <= MAX_WIDTH:
            end += 1
        for row in rows:
            cells = [f"{row[column]:>{widths[column]}}" for column in range(start, end)]
            print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
        if end < len(widths):
            print()
        start = end


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files of test.py")
    parser.add_argument("--output", type=Path, help="path of the page (default: beside the first results file)")
    args = one_line_errors(parser).parse_args()
    if args.output:
        files = {f"results file {path}": path for path in args.results}
        details = {f"{DETAILS_FILE} of {path}": report_folder(path) / DETAILS_FILE for path in args.results}
        check_outputs({"--output": args.output}, files | details)
        output_file(args.output)
        check_page(args.output)
    if len(args.results) == 1:
        page = write_report(args.results[0], output=args.output)
        run = load_checked_run(args.results[0])
        print_table(baseline_tables(run, KINDS[run.kind].bootstrap_metrics(run))[0])
        print(f"\nreport in {page}")
        return
    if len(set(args.results)) < len(args.results):
        raise InputError("a results file is given twice; name each once")
    compare_runs(args.results, args.output)


def check_page(path: Path) -> None:
    """Raise InputError if a file exists there that is no page."""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if not file.read(100).lstrip().lower().startswith(b"<!doctype html"):
                raise InputError(f"{path}: exists and is no page; name another --output")


def compare_runs(results_files: list[Path], output: Path | None) -> None:
    """Print the comparison of several runs and write its page."""
    runs = dict(zip(unique_names(results_files), map(load_checked_run, results_files), strict=True))
    check_comparable(list(runs.values()))
    metrics, compared, differences = comparison_tables(runs)
    print_table(metrics)
    print_table(compared)

    first, base = results_files[0], next(iter(runs.values()))
    page = output or first.with_name(f"{report_folder(first).name}.compared.html")
    title = f"{base.details['dataset']}: {', '.join(runs)}"
    sections = comparison_sections(runs, metrics, compared, differences)
    write_page(page, title, KINDS[base.kind].summarize(base), sections, {name: run.file for name, run in runs.items()})
    print(f"\n{SIGNIFICANCE_NOTE}\nreport in {page}")


if __name__ == "__main__":
    main()
