"""The values in JSON or TOML data, and the first in which two such tables differ."""

from collections.abc import Iterator
from typing import Any

from statex.errors import UserError

DEEPEST = 32
"""Levels of nested tables and lists."""


def single_values(values: Any, remedy: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value that is not a table or list, with the keys and indices that lead to it, in the order of the file.

    Args:
        values: a table, a list, or a single value.
        remedy: what the user can do about data that is nested too deeply.

    Raises:
        UserError: tables and lists are nested deeper than DEEPEST.
    """
    pending: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while pending:
        keys, value = pending.pop()
        if isinstance(value, dict | list | tuple):
            if len(keys) > DEEPEST:
                raise UserError(".".join(keys[:3]), "...", f"is nested deeper than {DEEPEST}", remedy)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += reversed([((*keys, str(key)), item) for key, item in items])
        else:
            yield keys, value


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON and TOML can hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any]:
    """The dotted name of the first value that differs between two tables, and both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                return first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    return key, before, now
