"""A page from sections: one HTML file that needs nothing else, its pictures inside; the same pictures as PNG."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

from reclingua.utils.files import atomic_write

TEMPLATE = "report.html.jinja"
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Cells as they are to be read; the first of a row is its name, and those of columns `texts` hold words."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """`alt` has the figures that matter, for whoever cannot see the picture."""

    name: str
    png: bytes
    alt: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def write_page(path: Path, title: str, summary: str, sections: list[Section], facts: dict[str, object]) -> None:
    """Write the page; `facts` stand at its end. All texts may hold what they will: none is taken for HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not for --help

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template(TEMPLATE).render(title=title, summary=summary, sections=sections, facts=facts)
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")


def write_pictures(folder: Path, sections: list[Section]) -> None:
    """Each picture as <folder>/<name>.png."""
    for picture in (picture for section in sections for picture in section.pictures):
        with atomic_write(folder / f"{picture.name}.png") as temporary:
            temporary.write_bytes(picture.png)


def number(value: float | None) -> str:
    """A figure with four digits; a dash where there is none."""
    return MISSING if value is None or value != value else f"{value:.4f}"


def with_interval(value: float | None, low: float, high: float) -> str:
    """ "0.1919 [0.1676, 0.2174]"."""
    return number(value) if value is None or low != low else f"{value:.4f} [{low:.4f}, {high:.4f}]"
