"""How the tensors of an expanded mixer start: one entry a name, each from a family's own description."""

from collections.abc import Callable
from typing import Any, Literal

from statex.families import Family, StateGeometry, TensorRows

TensorStart = TensorRows | Literal["keep", "fresh"]
"""Rows to grow by, or the whole tensor kept, or the whole tensor freshly initialised."""

Initializer = Callable[[Family, Any, StateGeometry, int | None], Callable[[str], TensorStart]]


def reinit(family: Family, config: Any, after: StateGeometry, rank: int | None) -> Callable[[str], TensorStart]:
    """All fresh, by the model's own initialisation, but what the family keeps (arXiv 2509.22630, section 3.3)."""
    return lambda name: "keep" if name in family.kept_by_reinit else "fresh"


def inherit(family: Family, config: Any, after: StateGeometry, rank: int | None) -> Callable[[str], TensorStart]:
    """Old weights kept; where there are new rows, they repeat old ones."""
    rows = family.inherited_rows(config, after)
    return lambda name: rows.get(name, "keep")


def preserve(family: Family, config: Any, after: StateGeometry, rank: int | None) -> Callable[[str], TensorStart]:
    """The same function at step 0, and a gradient for every new row within two steps."""
    rows = family.preserving_rows(config, after, rank)
    return lambda name: rows.get(name, "keep")


INITIALIZERS: dict[str, Initializer] = {"reinit": reinit, "inherit": inherit, "preserve": preserve}
RESETS_PRE_NORM = frozenset({"reinit"})
"""Initialisations that also reset the norm before the mixer."""
