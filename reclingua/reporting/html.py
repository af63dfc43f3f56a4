"""HTML page of a report: one self-contained file with embedded plots, which are also written as PNG files."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reclingua.utils.files import atomic_write

TEMPLATE = "report.html.jinja"
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Table of formatted cells; the first cell of a row is its header, columns `texts` hold words, not numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plot:
    """PNG image; `alt` states its main values for screen readers."""

    name: str
    png: bytes
    alt: str

    @property
    def base64_png(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """Section of the page: paragraphs, then tables, then plots."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def write_page(path: Path, title: str, summary: str, sections: list[Section], settings: Mapping[str, object]) -> None:
    """Write the page, with `settings` as a folded table at its end. All texts are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # imported here to keep --help fast

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template(TEMPLATE)
    html = template.render(title=title, summary=summary, sections=sections, settings=settings)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")


def write_plots(folder: Path, sections: list[Section]) -> None:
    """Write each plot to <folder>/<name>.png."""
    for plot in (plot for section in sections for plot in section.plots):
        with atomic_write(folder / f"{plot.name}.png") as temporary:
            temporary.write_bytes(plot.png)


def format_number(value: float | None) -> str:
    """Return the value with four decimals, or a dash for None and NaN."""
    return MISSING if value is None or value != value else f"{value:.4f}"


def format_interval(value: float | None, low: float, high: float) -> str:
    """Return "0.1919 [0.1676, 0.2174]", without the interval if it is NaN."""
    return format_number(value) if value is None or low != low else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def format_difference(value: float, low: float, high: float, is_significant: bool) -> str:
    """Return "+0.0148 [+0.0021, +0.0276] *", with the star for a significant difference."""
    return MISSING if value != value else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]{' *' if is_significant else ''}"
