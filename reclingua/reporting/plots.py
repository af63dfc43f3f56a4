"""Matplotlib plots of a report, from plain numbers.

Plots have a white background; a dark page inverts them (report.html.jinja). Labels are never parsed as formulas.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reclingua.reporting.bootstrap import Difference
from reclingua.reporting.html import Plot
from reclingua.utils.text import shorten

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Values = Sequence[float] | np.ndarray

MODEL_COLOUR = "#2563eb"
GREY = "#8c8c8c"
# The same in all plots.
BASELINE_COLOURS = {
    "popularity": GREY, "co-occurrence": "#d97706", "item-knn": "#a16207", "transition-ease": "#b91c1c",
    "ease": "#dc2626", "co-occurrence + item-knn + ease": "#f472b6", "sasrec": "#7c3aed",
}  # fmt: skip
# One colour for each group of the item map; grey is reserved for the other items.
GROUP_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#b8860b", "#bcbd22", "#17becf",
)  # fmt: skip
MAX_LABEL_LENGTH = 45  # letters
STYLE: "dict[RcKeyType, Any]" = {
    "text.parse_math": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "legend.frameon": False,
}


class Line(NamedTuple):
    """Line y over x, with a band from low to high if they are given."""

    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None


@contextmanager
def _figure(num_panels: int = 1, height: float = 4.2) -> Iterator[tuple["Figure", "list[Axes]"]]:
    """Yield (figure, axes of its panels) in the style of all plots."""
    from matplotlib import rc_context  # imported here to keep --help fast
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9 if num_panels > 1 else 7.5, height), layout="constrained")
        yield figure, [*np.atleast_1d(figure.subplots(1, num_panels))]


def _render(figure: "Figure", name: str, alt: str) -> Plot:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return Plot(name, png.getvalue(), alt)


def _colours(labels: Iterable[str]) -> list[str]:
    """Return the colour of each label: fixed ones for the baselines, a cycle for the models."""
    cycle = iter([MODEL_COLOUR, *(f"C{number}" for number in range(1, 10))] * 10)
    return [BASELINE_COLOURS.get(label) or next(cycle) for label in labels]


def _legend_label(label: str) -> str:
    """Return the label shortened; matplotlib leaves labels that start with an underscore out of the legend."""
    label = f" {label}" if label.startswith("_") else label
    return shorten(label, MAX_LABEL_LENGTH)


def lines(
    name: str, alt: str, named_lines: Mapping[str, Line], x: str, y: str, diagonal: str = "", marker: str = ""
) -> Plot:
    """Draw lines in one panel; `diagonal` labels a line from (0, 0) to (1, 1), "" draws none."""
    with _figure() as (figure, (axes,)):
        for (label, line), colour in zip(named_lines.items(), _colours(named_lines), strict=True):
            axes.plot(
                line.x, line.y, color=colour, label=_legend_label(label), linewidth=2, marker=marker, markersize=5
            )
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        if diagonal:
            axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label=diagonal)
        axes.set(xlabel=x, ylabel=y)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=not diagonal)
        axes.legend()
        return _render(figure, name, alt)


def bars(
    name: str,
    alt: str,
    named_bars: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    groups: list[str],
    x: str,
    y: str,
) -> Plot:
    """Draw groups of bars: label -> (heights [groups], bounds of their intervals [2, groups] or None)."""
    with _figure() as (figure, (axes,)):
        width = 0.8 / len(named_bars)
        colours = _colours(named_bars)
        for position, (label, (heights, bounds)) in enumerate(named_bars.items()):
            centres = np.arange(len(groups)) + (position - (len(named_bars) - 1) / 2) * width
            errors = None if bounds is None else np.maximum(0, [heights - bounds[0], bounds[1] - heights])
            axes.bar(centres, heights, width * 0.92, color=colours[position], label=_legend_label(label), yerr=errors,
                     error_kw={"elinewidth": 1.2, "capsize": 3})  # fmt: skip
        axes.set(xlabel=x, ylabel=y)
        axes.set_xticks(range(len(groups)), groups)
        if len(named_bars) > 1:
            axes.legend()
        return _render(figure, name, alt)


def curves(name: str, alt: str, over: str, panels: Mapping[str, Mapping[str, Line]]) -> Plot:
    """Draw a panel for each title of `panels` with its lines over steps or epochs."""
    with _figure(len(panels)) as (figure, all_axes):
        for axes, (title, named_lines) in zip(all_axes, panels.items(), strict=True):
            for position, (label, line) in enumerate(named_lines.items()):
                marker = "o" if len(line.x) < 20 else ""
                axes.plot(line.x, line.y, color=f"C{position}", label=_legend_label(label), marker=marker)
            axes.set(title=title, xlabel=over)
            axes.legend()
        return _render(figure, name, alt)


def histogram(name: str, alt: str, values: np.ndarray, mean: float, x: str, y: str) -> Plot:
    """Draw the distribution of values between 0 and 1, and their mean."""
    with _figure() as (figure, (axes,)):
        axes.hist(values, bins=np.linspace(0, 1, 21).tolist(), color=MODEL_COLOUR, alpha=0.85)
        axes.axvline(mean, color="black", linewidth=1.5, linestyle="--", label=f"mean {mean:.4f}")
        axes.set(xlabel=x, ylabel=y)
        axes.legend()
        return _render(figure, name, alt)


def codes(name: str, alt: str, levels: list[list[int]]) -> Plot:
    """Draw the number of items of each code, most first, in a panel for each level."""
    with _figure(len(levels), height=3.2) as (figure, all_axes):
        for number, (axes, items) in enumerate(zip(all_axes, levels, strict=True), start=1):
            axes.bar(np.arange(1, len(items) + 1), items, width=1, color=MODEL_COLOUR)
            axes.set(title=f"level {number}: {len(items):,} codes", xlabel="code, most items first")
        all_axes[0].set_ylabel("items")
        return _render(figure, name, alt)


def item_map(name: str, alt: str, points: np.ndarray, groups: np.ndarray, labels: list[str]) -> Plot:
    """Draw items [items, 2] as points coloured by their group [items], an index of `labels`; -1 is grey."""
    with _figure(height=6) as (figure, (axes,)):
        x, y = points.T
        is_other = groups < 0
        axes.scatter(x[is_other], y[is_other], s=7, color="#a8a8a8", linewidths=0, label="others")
        for group, label in enumerate(labels):
            mask, colour = groups == group, GROUP_COLOURS[group]
            axes.scatter(x[mask], y[mask], s=12, color=colour, linewidths=0, label=_legend_label(label))
        axes.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
        figure.legend(loc="outside right center", markerscale=2.5, title="first code")
        return _render(figure, name, alt)


def forest(name: str, alt: str, rows: Sequence[tuple[str, Difference]]) -> Plot:
    """Draw a forest plot: a row for each difference with its interval, the significant ones in colour."""
    with _figure(height=1.2 + 0.3 * len(rows)) as (figure, (axes,)):
        for row, (_, difference) in enumerate(rows):
            colour = MODEL_COLOUR if difference.is_significant else GREY
            axes.plot([difference.low, difference.high], [row, row], color=colour, linewidth=2)
            axes.plot([difference.value], [row], color=colour, marker="o")
        axes.axvline(0, color="black", linewidth=1, linestyle=":")
        axes.set_yticks(range(len(rows)), [_legend_label(label) for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel("difference")
        return _render(figure, name, alt)
