"""Read a page that was written, and make what `statex eval` writes."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from fabricated import fabricated_run

from statex.results import read_results, write_results


def tree(html):
    """The page as a tree; fails where a tag is not closed."""
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def section(html, title):
    """The words of a section."""
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return " ".join("".join(found.itertext()).split())


def cells(html, title):
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return ["".join(cell.itertext()) for cell in found.iter("td")]


def section_labels(html, title):
    """The text alternatives of a section's drawings."""
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return " ".join(drawing.get("alt") for drawing in found.iter("img"))


def evaluated(folder, arm):
    """What `statex eval` writes of one model, from a made-up run."""
    rows = read_results(fabricated_run(folder.with_name(f"{folder.name}-run"), models=("gla",)) / "results.jsonl")
    kept = [
        row for row in rows if row.arm == arm and row.baseline is None and row.suite not in ("state", "diagnostics")
    ]
    folder.mkdir()
    write_results(folder / "results.jsonl", [replace(row, model="a/path", arm="", seed=None) for row in kept])
    (folder / "evaluation.json").write_text(json.dumps({"evaluation": {"batch_size": 3}}))
    return folder
