"""Texts and names cut to size."""

from pathlib import Path


def unique_names(paths: list[Path]) -> list[str]:
    """File names without .index.json, with as many of their folders as it takes to tell them apart."""
    bare = [path.with_name(path.name.removesuffix(".json").removesuffix(".index")) for path in paths]
    for length in range(1, max(len(path.parts) for path in bare) + 1):
        names = ["/".join(path.parts[-length:]) for path in bare]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # D.json and D.index.json


def shorten(text: str, letters: int) -> str:
    """The text, or where it is longer than so many letters its beginning and an ellipsis."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
