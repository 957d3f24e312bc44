"""A report as Markdown, with its pictures as files."""

import re
from collections.abc import Sequence
from html import escape

from statex.reporting.render.content import (
    Block,
    Code,
    Document,
    Figure,
    Folded,
    Heading,
    Panel,
    Table,
    TableCell,
    Text,
)
from statex.utils import markup
from statex.utils.markup import linked, literal


def page(documents: Sequence[Document]) -> str:
    """The Markdown of one or several runs."""
    parts = []
    for index, document in enumerate(documents):
        prefix = _prefix(documents, index)
        parts.append(f"# {literal(document.title)}\n\n{linked(document.subtitle, not prefix)}")
        for section in document.sections:
            parts += [f"## {section.title}", *(_block(block, prefix) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def picture_files(documents: Sequence[Document]) -> dict[str, str]:
    """File name -> SVG of every panel."""
    return {
        file_name(panel, _prefix(documents, index)): panel.svg
        for index, document in enumerate(documents)
        for section in document.sections
        for panel in panels(section.blocks)
    }


def panels(blocks: Sequence[Block]) -> list[Panel]:
    """All drawings among blocks, folded ones too."""
    found: list[Panel] = []
    for block in blocks:
        if isinstance(block, Figure):
            found += block.panels
        if isinstance(block, Folded):
            found += panels(block.blocks)
    return found


def file_name(panel: Panel, prefix: str) -> str:
    """The name of a panel's file, in characters that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", prefix + panel.name) + ".svg"


def _prefix(documents: Sequence[Document], index: int) -> str:
    return f"{index + 1}-" if len(documents) > 1 else ""


def _block(block: Block, prefix: str) -> str:
    match block:
        case Heading(text):
            return f"### {literal(text)}"
        case Text(text, tone):
            return "> " * (tone == "note") + linked(text, not prefix)
        case Code(text):
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)  # so that the quoted text cannot close the fence
            return f"{fence}toml\n{text.rstrip()}\n{fence}"
        case Folded(title, blocks):
            inner = "\n\n".join(_block(one, prefix) for one in blocks)
            return f"<details><summary>{escape(title)}</summary>\n\n{inner}\n\n</details>"
        case Figure():
            words = [re.sub(r"[\[\]]", r"\\\g<0>", literal(one.text)) for one in block.panels]
            images = [f"![{text}](figures/{file_name(one, prefix)})" for text, one in zip(words, block.panels)]
            return "\n".join(images) + f"\n\n*{linked(block.caption, not prefix)}*"
        case Table():
            return _table(block, prefix)
    raise TypeError(type(block))


def _table(table: Table, prefix: str) -> str:
    titles = [f"{one.title} ({one.beneath})" if one.beneath else one.title for one in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    text = markup.table([literal(one) for one in titles], rows, [column.words for column in table.columns])
    return "\n\n".join([f"*{linked(table.caption, not prefix)}*", text, *map(literal, table.notes)])


def _cell(cell: TableCell) -> str:
    mark = f"({cell.mark})" if cell.mark else ""
    return literal(" ".join(part for part in (cell.text, cell.beneath, mark) if part))
