"""Display names, shortened texts and durations."""

from pathlib import Path


def unique_names(paths: list[Path]) -> list[str]:
    """Return file names without .index.json, with as many parent folders as make them distinct."""
    bare = [path.with_name(path.name.removesuffix(".json").removesuffix(".index")) for path in paths]
    for length in range(1, max((len(path.parts) for path in bare), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in bare]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # D.json beside D.index.json


def shorten(text: str, max_length: int) -> str:
    """Return `text`, cut to `max_length` characters with an ellipsis at the end if it is longer."""
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def format_duration(seconds: float) -> str:
    """Return a duration in its largest units: "45 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
