"""A made-up run and its page."""

import pytest
from fabricated import fabricated_run

from statex.reporting.page import write_report


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A made-up run with three seeds and the optional suites: (folder, HTML, Markdown)."""
    folder = fabricated_run(tmp_path_factory.mktemp("whole"), seeds=(0, 1, 2), extra=True)
    html, markdown = write_report(folder)
    return folder, html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")
