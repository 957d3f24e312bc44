"""What a report consists of, before it becomes HTML or Markdown.

Texts and captions may use the markup of `statex.utils.markup`; cells, titles and notes are plain.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TableCell:
    """A cell of a table: a value, a mark before it, and beneath it its interval (and n, unless the table shows it
    elsewhere)."""

    text: str
    beneath: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column's title and, beneath it, what all its cells share; values are right-aligned, words left-aligned."""

    title: str
    beneath: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[Column]
    rows: list[list[TableCell]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One drawing: `name` becomes its file name, `text` says in words what it shows."""

    name: str
    svg: str
    text: str


@dataclass(frozen=True)
class Figure:
    """Drawings side by side, stacked on a narrow page; `small` ones are four in a row on a wide page."""

    caption: str
    panels: list[Panel]
    small: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` is "" (prose), "lead" (the conclusion) or "note" (a reservation)."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until the reader opens them."""

    title: str
    blocks: list["Block"]


Block = Table | Figure | Text | Heading | Code | Folded


@dataclass(frozen=True)
class PageSection:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """The report of one run: title, a line under it, and its sections."""

    title: str
    subtitle: str
    sections: list[PageSection]
