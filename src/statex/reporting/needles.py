"""Needle suites, whose slices have a length and a depth: heat maps of arms and of their differences, and tables."""

import math
from dataclasses import dataclass, replace

from statex.reporting import figures
from statex.reporting.content import Block, Figure, Folded, Panel, Text
from statex.reporting.figures import HeatMap
from statex.reporting.run import Measure, Run, slice_key
from statex.reporting.tables import by_arm, by_measure
from statex.reporting.wording import measure_title, metric_title, slice_title, suite_title

NEAR_ZERO = 0.2
"""Where no cell's accuracy reaches this, the NLL of the answers is drawn too."""

_SMALLEST_SCALE = 0.25
_MANY_LENGTHS = 5

Rows = list[list[float | None]]
"""A grid's values: a row for each depth, a column for each length, None where a cell was not run."""


@dataclass(frozen=True)
class Grid:
    """One metric of a needle suite over lengths and depths, for all arms of a model."""

    title: str
    name: str
    accuracy: bool
    lengths: list[int]
    depths: list[float]
    arms: dict[str, Rows]
    n: int | None


def is_needle(measure: Measure) -> bool:
    """Whether a figure is of one cell of length and depth."""
    return {"length", "depth"} <= measure.values.keys()


def needle_blocks(run: Run, model: str, suite: str) -> list[Block]:
    """All about a needle suite of a model: heat maps, a table by length, and every cell, folded."""
    measures = run.measures(model, suite)
    if not measures:
        return [Text("Not run.")]
    cells = [one for one in measures if is_needle(one)]
    blocks: list[Block] = [_figure(run, model, suite, grid) for grid in _grids(run, model, suite, cells)]
    if by_length := [one for one in measures if not is_needle(one)]:
        caption = f"{suite_title(suite)}, {model}: over all depths, with 95 % intervals. n counts questions."
        blocks.append(by_arm(run, model, by_length, caption, measure_title))
    if cells:
        caption = f"{suite_title(suite)}, {model}: every cell, with 95 % intervals."
        blocks.append(Folded("Every cell with its interval", [by_measure(run, model, cells, caption)]))
    return blocks


def _grids(run: Run, model: str, suite: str, cells: list[Measure]) -> list[Grid]:
    """The grids to draw: accuracy, other metrics only where accuracy is near 0, each for every other key's value."""
    groups: dict[tuple[str, str], list[Measure]] = {}
    for cell in cells:
        rest = slice_key({key: value for key, value in cell.values.items() if key not in ("length", "depth")})
        groups.setdefault((cell.metric, rest), []).append(cell)
    grids = [_grid(run, model, suite, metric, rest, members) for (metric, rest), members in groups.items()]
    accuracies = [value for grid in grids if grid.accuracy for value in _known(grid.arms)]
    near_zero = all(value < NEAR_ZERO for value in accuracies)
    return [grid for grid in grids if grid.accuracy or near_zero]


def _grid(run: Run, model: str, suite: str, metric: str, rest: str, cells: list[Measure]) -> Grid:
    others = Measure(suite, metric, rest).values
    lengths = sorted({one.values["length"] for one in cells})
    depths = sorted({one.values["depth"] for one in cells})
    arms: dict[str, Rows] = {arm: [[None] * len(lengths) for _ in depths] for arm in run.arms(model)}
    counts = set()
    for arm, rows in arms.items():
        for cell in cells:
            if estimate := run.find(model, arm, cell):
                rows[depths.index(cell.values["depth"])][lengths.index(cell.values["length"])] = estimate.result.value
                counts.add(estimate.result.n)
    title = metric_title(metric) + (f", {slice_title(others)}" if others else "")
    name = "-".join([suite, metric, model, *(f"{key}-{value}" for key, value in others.items())])
    return Grid(title, name, metric == "accuracy", lengths, depths, arms, counts.pop() if len(counts) == 1 else None)


def _figure(run: Run, model: str, suite: str, grid: Grid) -> Figure:
    baseline = run.baseline(model)
    changes = {
        arm: [[_minus(a, b) for a, b in zip(*pair)] for pair in zip(rows, grid.arms[baseline])]
        for arm, rows in grid.arms.items()
        if baseline is not None and run.kind(arm) in ("statex", "control")
    }
    known = _known(grid.arms) or [0.0]
    smallest, largest = (0.0, 1.0) if grid.accuracy else (min(known), max(known))
    columns, depths = [figures.short(n) for n in grid.lengths], [f"{depth:g}" for depth in grid.depths]
    plain = HeatMap(
        "", "length, tokens", "depth", columns, depths, [], smallest, largest, lower_is_better=not grid.accuracy
    )
    scale = max([_SMALLEST_SCALE, *(abs(value) for value in _known(changes))])
    signed = replace(plain, smallest=0.0, largest=scale, signed=True)
    panels = [_panel(replace(plain, title=arm, values=rows), grid, arm) for arm, rows in grid.arms.items()]
    for arm, rows in changes.items():
        chart = replace(signed, title=f"{arm} − {baseline}", values=rows)
        panels.append(_panel(chart, grid, f"{arm}-minus-{baseline}"))
    return Figure(_caption(model, suite, grid, bool(changes)), panels, small=len(grid.lengths) < _MANY_LENGTHS)


def _caption(model: str, suite: str, grid: Grid, with_changes: bool) -> str:
    n = f"n = {grid.n} questions in each cell" if grid.n is not None else "n of each cell in the folded table"
    scale = "stronger is higher" if grid.accuracy else "in nats, stronger is higher, lower is better"
    caption = f"{suite_title(suite)}, {model}: {grid.title} by length and depth ({n}; {scale}). "
    return (
        caption + "In the differences blue is better and orange worse. " * with_changes + "Intervals are in the tables."
    )


def _panel(chart: HeatMap, grid: Grid, name: str) -> Panel:
    rows = ["; ".join("not run" if value is None else f"{value:.2f}" for value in row) for row in chart.values]
    words = [f"depth {depth}: {row}" for depth, row in zip(chart.rows, rows)]
    text = f"{chart.title}, {grid.title} at lengths {', '.join(chart.columns)}. " + ". ".join(words)
    return Panel(f"{grid.name}-{name}", figures.heat_map(chart), text)


def _known(arms: dict[str, Rows]) -> list[float]:
    """All values that are numbers."""
    values = [value for rows in arms.values() for row in rows for value in row]
    return [value for value in values if value is not None and math.isfinite(value)]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
