"""The pictures of a report, drawn by matplotlib from plain numbers.

They are for a light page; a dark one turns them over (report.html.jinja). Texts in them are not taken for formulas.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np

from reclingua.reporting.html import Picture
from reclingua.utils.text import shorten

COLOURS = {"popularity": "#8c8c8c", "co-occurrence": "#d97706"}  # the same in all pictures
MODEL = "#2563eb"
LONGEST = 45  # letters of a name
# As many as a map of items has groups; no grey, which is that of the others.
GROUPS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#b8860b", "#bcbd22", "#17becf")
STYLE = {
    "text.parse_math": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "legend.frameon": False,
}


class Line(NamedTuple):
    """y over x, and a band around it where there are a low and a high one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@contextmanager
def _sheet(panels: int = 1, height: float = 4.2) -> Iterator[tuple]:
    """(a figure, its panels), in the style of all pictures."""
    from matplotlib import rc_context  # a second to import; not for --help
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9 if panels > 1 else 7.5, height), layout="constrained")
        yield figure, np.atleast_1d(figure.subplots(1, panels))


def _picture(figure, name: str, alt: str) -> Picture:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return Picture(name, png.getvalue(), alt)


def _colours(names: Iterable[str]) -> list[str]:
    """The colour of each: the baselines' own, the models' in their order."""
    others = iter([MODEL, *(f"C{at}" for at in range(1, 10))] * 10)
    return [COLOURS.get(name) or next(others) for name in names]


def _shown(name: str) -> str:
    """A name as a picture has room for it."""
    name = f" {name}" if name.startswith("_") else name  # matplotlib leaves such names out of a legend
    return shorten(name, LONGEST)


def lines(
    name: str, alt: str, given: Mapping[str, Line], x: str, y: str, diagonal: str = "", marker: str = ""
) -> Picture:
    """Lines in one panel; `diagonal` names the line from (0, 0) to (1, 1), if there is to be one."""
    with _sheet() as (figure, (panel,)):
        for (label, line), colour in zip(given.items(), _colours(given), strict=True):
            panel.plot(line.x, line.y, color=colour, label=_shown(label), linewidth=2, marker=marker, markersize=5)
            if line.low is not None:
                panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        if diagonal:
            panel.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label=diagonal)
        panel.set(xlabel=x, ylabel=y)
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", integer=not diagonal)
        panel.legend()
        return _picture(figure, name, alt)


def bars(
    name: str,
    alt: str,
    given: Mapping[str, tuple[Sequence[float], np.ndarray | None]],
    places: list[str],
    x: str,
    y: str,
) -> Picture:
    """Groups of bars: label -> (heights [places], ends of their intervals [2, places] or None)."""
    with _sheet() as (figure, (panel,)):
        width = 0.8 / len(given)
        for at, ((label, (heights, ends)), colour) in enumerate(zip(given.items(), _colours(given), strict=True)):
            left = np.arange(len(places)) + (at - (len(given) - 1) / 2) * width
            errors = None if ends is None else np.maximum(0, [heights - ends[0], ends[1] - heights])
            panel.bar(left, heights, width * 0.92, color=colour, label=_shown(label), yerr=errors,
                      error_kw={"elinewidth": 1.2, "capsize": 3})  # fmt: skip
        panel.set(xlabel=x, ylabel=y)
        panel.set_xticks(range(len(places)), places)
        if len(given) > 1:
            panel.legend()
        return _picture(figure, name, alt)


def curves(name: str, alt: str, over: str, panels: Mapping[str, Mapping[str, Line]]) -> Picture:
    """A panel for each of `panels`, title -> its lines, over steps or epochs."""
    with _sheet(len(panels)) as (figure, drawn):
        for panel, (title, given) in zip(drawn, panels.items(), strict=True):
            for at, (label, line) in enumerate(given.items()):
                panel.plot(line.x, line.y, color=f"C{at}", label=_shown(label), marker="o" if len(line.x) < 20 else "")
            panel.set(title=title, xlabel=over)
            panel.legend()
        return _picture(figure, name, alt)


def histogram(name: str, alt: str, values: np.ndarray, mean: float, x: str, y: str) -> Picture:
    """How values between 0 and 1 are spread, and their mean."""
    with _sheet() as (figure, (panel,)):
        panel.hist(values, bins=np.linspace(0, 1, 21), color=MODEL, alpha=0.85)
        panel.axvline(mean, color="black", linewidth=1.5, linestyle="--", label=f"mean {mean:.4f}")
        panel.set(xlabel=x, ylabel=y)
        panel.legend()
        return _picture(figure, name, alt)


def codes(name: str, alt: str, levels: list[list[int]]) -> Picture:
    """How many items each code has, most first, a panel for each level."""
    with _sheet(len(levels), height=3.2) as (figure, drawn):
        for at, (panel, items) in enumerate(zip(drawn, levels, strict=True), start=1):
            panel.bar(np.arange(1, len(items) + 1), items, width=1, color=MODEL)
            panel.set(title=f"level {at}: {len(items):,} codes", xlabel="code, most items first")
        drawn[0].set_ylabel("items")
        return _picture(figure, name, alt)


def item_map(name: str, alt: str, points: np.ndarray, group: np.ndarray, names: list[str]) -> Picture:
    """Items [items, 2] on a plane, in a colour for each group [items]; those of none, -1, are grey."""
    with _sheet(height=6) as (figure, (panel,)):
        panel.scatter(*points[group < 0].T, s=7, color="#a8a8a8", linewidths=0, label="others")
        for at, label in enumerate(names):
            panel.scatter(*points[group == at].T, s=12, color=GROUPS[at], linewidths=0, label=_shown(label))
        panel.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
        figure.legend(loc="outside right center", markerscale=2.5, title="first code")
        return _picture(figure, name, alt)


def forest(name: str, alt: str, rows: Sequence[tuple[str, tuple[float, float, float, bool]]]) -> Picture:
    """Differences with their intervals, one below the other; the real ones in colour."""
    with _sheet(height=1.2 + 0.3 * len(rows)) as (figure, (panel,)):
        for at, (_, (value, low, high, real)) in enumerate(rows):
            colour = MODEL if real else "#8c8c8c"
            panel.plot([low, high], [at, at], color=colour, linewidth=2)
            panel.plot([value], [at], color=colour, marker="o")
        panel.axvline(0, color="black", linewidth=1, linestyle=":")
        panel.set_yticks(range(len(rows)), [_shown(label) for label, _ in rows])
        panel.invert_yaxis()
        panel.set_xlabel("difference")
        return _picture(figure, name, alt)
