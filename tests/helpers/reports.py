"""Copies and changes of a run's report."""

import json
import shutil

from reclingua.reporting.details import folder_of


def copy_of(file, folder, name="r.json"):
    """A copy of a results file, with the folder of its report."""
    copy = folder / name
    shutil.copy(file, copy)
    shutil.copytree(folder_of(file), folder_of(copy))
    return copy


def change(file, **fields):
    """Put other fields into the evidence of a results file."""
    path = folder_of(file) / "evidence.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
