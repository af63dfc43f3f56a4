"""Report of a single run: loads its results, checks them against the details, and writes the page and its plots."""

from pathlib import Path

from reclingua.reporting.compare import KINDS
from reclingua.reporting.details import DETAILS_FILE, PAGE_FILE, Run, load_run, report_folder
from reclingua.reporting.html import write_page, write_plots
from reclingua.utils.errors import InputError
from reclingua.utils.files import write_json


def write_report(results_file: Path, details: dict | None = None, output: Path | None = None) -> Path:
    """Write the report of a results file and return the path of its page.

    Args:
        details: details of a new run, written first; default: those beside the results file.
        output: path of the page; default: report.html in the report folder. Plots are written beside it.

    Raises:
        InputError: results or details are missing, invalid, or of different runs; a file cannot be written.
    """
    folder = report_folder(results_file)
    if details is not None:
        write_json(folder / DETAILS_FILE, details)
    run = load_checked_run(results_file)
    sections = KINDS[run.kind].build_sections(run)
    page = output or folder / PAGE_FILE
    title = f"{run.details['dataset']}: {run.method}"
    write_page(page, title, KINDS[run.kind].summarize(run), sections, run_settings(run))
    write_plots(page.parent, sections)
    return page


def load_checked_run(results_file: Path) -> Run:
    """Load a run; InputError unless its details reproduce the metrics of its results file."""
    run = load_run(results_file)
    try:
        KINDS[run.kind].check_results(run)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{results_file}: is not a results file of test.py; run test.py again") from None
    return run


def run_settings(run: Run) -> dict[str, object]:
    """Return the flags, versions and duration of a run, for the end of its page."""
    metadata = {key: run.results[key] for key in ("seconds", "versions") if key in run.results}
    return {"results file": run.file, **metadata, **run.results["arguments"]}
