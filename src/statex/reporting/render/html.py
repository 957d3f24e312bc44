"""A report as one HTML file: style and pictures inline, no scripts, nothing fetched."""

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from statex.reporting.render.content import Document, Panel
from statex.utils.markup import anchor, inline

TEMPLATES = Path(__file__).parent / "templates"


def page(documents: Sequence[Document]) -> str:
    """The HTML of one or several runs."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "inline": inline, "anchor": anchor, "image": _image, "kind": lambda block: type(block).__name__,
    }  # fmt: skip
    numbered = [(f"r{index}", document) for index, document in enumerate(documents, start=1)]
    return environment.get_template("page.html.jinja").render(documents=numbered).lstrip()


def _image(panel: Panel) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(panel.svg.encode()).decode()
