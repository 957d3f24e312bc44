"""What a suite is: its settings, its cells, and the metrics of its items. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from statex.settings import Section

if TYPE_CHECKING:
    from statex.evaluation.context import Context
    from statex.evaluation.records import Score


@dataclass(frozen=True)
class Cell:
    """The part of a suite that is scored and stored as a unit: a length and depth, a number of pairs, or all of it."""

    name: str
    slice: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """One suite.

    Args:
        name: its name in recipes and on the command line; for our suites, the name of the file.
        units: metric -> unit; a "fraction" lies between 0 and 1.
        groups: the keys of a slice by which metrics are reported, () for all items together.
        cells: the cells in order, cheap to list.
        score: the scores of one cell's items.
        settings: the class of its section in a recipe, `[evaluation.<name>]`.
        check: raises what building the items would raise, as far as that can be found cheaply and without the model.
        paired: whether its items are the same for every model, so that arms can be compared item by item.
    """

    name: str
    units: dict[str, str]
    groups: tuple[tuple[str, ...], ...]
    cells: Callable[[Context], list[Cell]]
    score: Callable[[Context, Cell], list[Score]]
    settings: type[Section] = Section
    check: Callable[[Context], object] = lambda context: None
    paired: bool = True
