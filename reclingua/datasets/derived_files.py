"""Derived files of a dataset folder that were made from other data than it has now."""

from glob import escape
from pathlib import Path

from reclingua.datasets.interactions import open_interactions, other_part
from reclingua.utils.provenance import read_record

# Ends of names after D. -> the command that makes such a file.
COMMANDS = {
    ".npy": "python -m index.embed",
    "index.json": "python -m index.generate",
    "user.json": "python -m data.intentions",
}


def print_stale_files(data_path: Path, name: str) -> None:
    """Print which embeddings, indices and user texts of dataset `name` were made from other data, or may have been."""
    files = [path for path in sorted((data_path / name).glob(f"{escape(name)}.*")) if _command(path)]
    if not files:
        return
    dataset = open_interactions(data_path, name)
    for path in files:
        if part := other_part(path, dataset):
            print(f"  stale: {path.name} was made from other {part}; renew it by {_command(path)}")
        elif read_record(path) is None:
            print(f"  {path.name} does not state what it was made from: if that changed, renew it by {_command(path)}")


def _command(path: Path) -> str | None:
    return next((command for ending, command in COMMANDS.items() if path.name.endswith(ending)), None)
