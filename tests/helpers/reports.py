"""Copies and edits of a run's results file and details."""

import json
import shutil

from reclingua.reporting.details import DETAILS_FILE, report_folder


def copy_run(file, folder, name="r.json"):
    """Copy a results file and the folder of its report."""
    copy = folder / name
    shutil.copy(file, copy)
    shutil.copytree(report_folder(file), report_folder(copy))
    return copy


def details_file(file):
    """Return the path of the details of a results file."""
    return report_folder(file) / DETAILS_FILE


def edit_details(file, **fields):
    """Overwrite fields in the details of a results file."""
    path = details_file(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
