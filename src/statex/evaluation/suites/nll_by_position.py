"""Negative log-likelihood of held-out text by position, up to the training length and beyond it."""

import itertools

from statex.evaluation.context import Context
from statex.evaluation.records import Score, digest
from statex.evaluation.suite import Cell, Suite
from statex.evaluation.text.windows import Window, WindowSettings, held_out_windows, scored_windows, window_cells

FIRST_EDGE = 32
"""Tokens of the first range, or fewer; each further range doubles the position."""


class NllByPositionSettings(WindowSettings):
    """The windows of all text suites."""


def position_ranges(length: int, training_length: int | None = None) -> list[tuple[int, int]]:
    """(from, to) ranges of positions that double up to `length`, with a border at the training length."""
    edges = {length}
    while length > FIRST_EDGE:
        length //= 2
        edges.add(length)
    if training_length is not None and training_length < max(edges):
        edges.add(training_length)
    ordered = [0, *sorted(edges)]
    return list(itertools.pairwise(ordered))


def windows(context: Context) -> list[Window]:
    default = 2 * context.training_length if context.training_length else None
    return held_out_windows(context, "nll_by_position", context.settings("nll_by_position"), default)


def score(context: Context, cell: Cell) -> list[Score]:
    found = windows(context)
    ranges = position_ranges(len(found[0].ids) - 1, context.training_length)
    return [
        Score(
            item=f"{cell.name}/{window.name}/{first}",
            cluster=window.document,
            slice={"from": first, "to": end},
            scores={"nll": float(nll[first:end].mean())},
            weights={"nll": float(end - first)},
            digest=digest(window.ids),
            measured={"tokens": len(nll)},
        )
        for window, nll in scored_windows(context, found)
        for first, end in ranges
    ]


SUITE = Suite(
    name="nll_by_position",
    units={"nll": "nats"},
    groups=(("from", "to"), ()),
    cells=window_cells,
    score=score,
    settings=NllByPositionSettings,
    check=windows,
)
