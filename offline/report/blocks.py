"""What a page is made of: sections of text, tables, code and figures."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A figure with what a reader needs for it.

    Attributes:
        name: of the PNG file, without its ending, and of the anchor.
        title: over it.
        caption: one sentence on how to read it.
        alt: what it shows, for those who cannot see it.
        figure: the drawing.

    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Table:
    """Cells as text; every column but the first ``text_columns`` is aligned as numbers. ``strong``: rows in bold;
    ``wrap``: break long text cells."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    strong: frozenset[int] = frozenset()
    wrap: bool = False


@dataclass(frozen=True)
class Section:
    """A titled part of the page. ``absent``: a sentence in the place of figures that could not be made."""

    name: str
    title: str
    paragraphs: tuple[str, ...] = ()
    code: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Tile:
    """A key number: value, what it is, and how it compares."""

    value: str
    label: str
    detail: str
