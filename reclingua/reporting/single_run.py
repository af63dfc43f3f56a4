"""The report of one run."""

from pathlib import Path

from reclingua.reporting.compare import KINDS
from reclingua.reporting.details import Run, folder_of, open_run
from reclingua.reporting.html import write_page, write_pictures
from reclingua.utils.errors import InputError
from reclingua.utils.files import write_json


def write_report(results_file: Path, evidence: dict | None = None, output: Path | None = None) -> Path:
    """Write the report of a results file, first its `evidence` if it is new; returns the page's path.

    Raises:
        InputError: results or evidence are missing, broken, or not of one run; the report cannot be written.
    """
    folder = folder_of(results_file)
    if evidence is not None:
        write_json(folder / "evidence.json", evidence)
    run = open_checked(results_file)
    found = KINDS[run.kind].sections(run)
    page = output or folder / "report.html"
    title = f"{run.evidence['dataset']}: {run.method}"
    write_page(page, title, KINDS[run.kind].summary(run), found, facts_of(run))
    write_pictures(page.parent, found)
    return page


def open_checked(results_file: Path) -> Run:
    """A run whose evidence gives the figures of its results file; InputError otherwise."""
    run = open_run(results_file)
    try:
        KINDS[run.kind].check(run)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{results_file}: is not what test.py writes; run it again") from None
    return run


def facts_of(run: Run) -> dict[str, object]:
    facts = {key: run.results[key] for key in ("seconds", "versions") if key in run.results}
    return {"results file": run.file, **facts, **run.results["arguments"]}
