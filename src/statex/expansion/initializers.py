"""How the tensors of an expanded mixer start: one entry a name, each from a family's own description."""

from collections.abc import Callable
from typing import Any

from statex.expansion.edits import Edit
from statex.families import Family, StateGeometry

EditOf = Callable[[str], Edit]
Initializer = Callable[[Family, Any, StateGeometry, StateGeometry, int | None], EditOf]
"""From family, configuration, the states before and after, and rank: the edit of each of the mixer's tensors."""


def reinit(family: Family, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None) -> EditOf:
    """All fresh, by the model's own initialisation, but what the family keeps (arXiv 2509.22630, section 3.3).

    What it keeps are numbers of each head: where several become one, there is none to keep.
    """
    kept = family.kept_by_reinit if after.num_heads == before.num_heads else ()
    return lambda name: "kept" if name in kept else "re-initialised"


def inherit(family: Family, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None) -> EditOf:
    """Old weights kept; where there are new rows, they repeat old ones."""
    rows = family.inherited_rows(config, before, after)
    return lambda name: rows.get(name, "kept")


def preserve(family: Family, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None) -> EditOf:
    """The same function at step 0, and a gradient for every new row within two steps."""
    rows = family.preserving_rows(config, before, after, rank)
    return lambda name: rows.get(name, "kept")


INITIALIZERS: dict[str, Initializer] = {"reinit": reinit, "inherit": inherit, "preserve": preserve}
RESETS_PRE_NORM = frozenset({"reinit"})
"""Initialisations that also reset the norm before the mixer."""
