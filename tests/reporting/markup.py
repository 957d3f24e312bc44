"""What is in the markup of a page."""

import xml.etree.ElementTree as ElementTree


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
