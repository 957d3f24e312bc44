"""The markup of texts in reports and model cards, a subset of Markdown; and how foreign text is escaped.

`code`, **strong** and *emphasised* words, links to a section by its title, "[words](#Title)", and a backslash before a
literal character.
"""

import re

from markupsafe import Markup, escape

_MARKS = re.compile(
    r"\\(?P<literal>.)|`(?P<code>[^`]+)`|\*\*(?P<strong>.+?)\*\*|\*(?P<em>[^*]+)\*|\[(?P<words>[^\]\\]+)\]\(#(?P<title>[^)]+)\)"
)
_MEANT = re.compile(r"[\\`*<|~]|\](?=\()|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def literal(text: str) -> str:
    """Foreign text (a device's name, a note) escaped for Markdown and for `inline`, on one line."""
    return _MEANT.sub(r"\\\g<0>", " ".join(text.split()))


def inline(text: str, prefix: str = "") -> Markup:
    """A text with its markup as HTML and all else escaped; links lead to sections whose ids begin with `prefix`."""
    parts, end = [], 0
    for found in _MARKS.finditer(text):
        parts.append(escape(text[end : found.start()]))
        end = found.end()
        kind = found.lastgroup
        if kind == "title":
            parts.append(Markup('<a href="#{}">{}</a>').format(anchor(found["title"], prefix), found["words"]))
        elif kind == "literal":
            parts.append(escape(found["literal"]))
        elif kind == "code":
            parts.append(Markup("<code>{}</code>").format(found["code"]))
        else:
            parts.append(Markup(f"<{kind}>{{}}</{kind}>").format(inline(found[str(kind)], prefix)))
    return Markup("").join([*parts, escape(text[end:])])


def plain(text: str) -> str:
    """A text without its markup, for a terminal."""
    return str(inline(text).striptags())


def linked(text: str, alone: bool) -> str:
    """A text as Markdown without HTML tags; links become their words where section titles are not unique (`alone`)."""

    def link(found: re.Match[str]) -> str:
        if found.lastgroup != "title":
            return found[0]
        words, title = found["words"], found["title"]
        return f"[{words}](#{title.lower().replace(' ', '-')})" if alone else words

    return re.sub(r"(?<!\\)<", "&lt;", _MARKS.sub(link, text))


def anchor(title: str, prefix: str) -> str:
    """The id of a section."""
    return f"{prefix}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def table(titles: list[str], rows: list[list[str]], left: list[bool] | None = None) -> str:
    """A Markdown table of texts that are already escaped, by default without alignment."""
    rule = ["---"] * len(titles) if left is None else [":--" if one else "--:" for one in left]
    lines = [titles, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
