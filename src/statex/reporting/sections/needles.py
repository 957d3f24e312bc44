"""The section about long contexts: accuracy by length, heat maps over length and depth, and their differences."""

import math
from dataclasses import dataclass, replace

from statex.reporting.render import figures
from statex.reporting.render.content import Block, Figure, Folded, Heading, PageSection, Panel, Text
from statex.reporting.render.figures import HeatMap
from statex.reporting.render.panels import slice_panels
from statex.reporting.render.tables import by_measure
from statex.reporting.run import Measure, Run, slice_key
from statex.reporting.verdict import above_zero
from statex.reporting.wording import (
    format_value,
    listing,
    metric_title,
    short_title,
    slice_title,
    suite_measure_title,
    suite_title,
)
from statex.results.suites import SUITES

LONG_CONTEXT = tuple(name for name, entry in SUITES.items() if entry.section == "long contexts")

NEAR_ZERO = 0.2
"""Where no cell's accuracy reaches this, the NLL of the answers is drawn too."""

_SMALLEST_SCALE = 0.25
_MANY_LENGTHS = 5

NEAR_ZERO_REMARK = (
    "Something inserted into a long context has to be found. Where accuracy is near 0, the NLL of the answer "
    "(in nats, lower is better) still distinguishes the arms."
)
DIFFERENCES_REMARK = (
    "Heat maps show the arms, then their differences from the arm without expansion: blue is better, orange worse, and "
    "a border marks cells where the 95 % interval of the paired difference excludes 0."
)

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
    cells: list[Measure]


def long_context_section(run: Run) -> PageSection | None:
    """All suites that hide something in a context, by length, then by depth; None where none was requested."""
    suites = dict.fromkeys(suite for model in run.models for suite in run.suites(model) if is_long_context(run, suite))
    suites |= dict.fromkeys(suite for suite in run.asked if suite in LONG_CONTEXT)
    if not suites:
        return None
    blocks: list[Block] = [Text(NEAR_ZERO_REMARK)]
    if any(run.baseline(model) for model in run.models):
        blocks.append(Text(DIFFERENCES_REMARK))
    for model in run.models:
        blocks += _found_by_length(run, model, list(suites))
    for suite in suites:
        blocks += [Heading(suite_title(suite)), *_suite_blocks(run, suite)]
    return PageSection("Long contexts", blocks)


def _found_by_length(run: Run, model: str, suites: list[str]) -> list[Block]:
    """A table of the suites in which any arm found anything, and a sentence about the other suites."""
    found: list[Measure] = []
    nothing: list[str] = []
    fewest, open_below = math.inf, 0.0
    for suite in suites:
        measures = [one for one in run.measures(model, suite, "accuracy") if not is_needle(one)]
        known = [one for measure in measures for arm in run.arms(model) if (one := run.find(model, arm, measure))]
        if any(one.result.value for one in known):
            found += measures
        elif known:
            nothing.append(short_title(suite))
            fewest = min(fewest, *(one.result.n or 0 for one in known))
            open_below = max(open_below, *(one.interval[1] if one.interval else 1.0 for one in known))
    blocks: list[Block] = []
    if found:
        caption = f"Accuracy of {model} in contexts of each length, over all depths, with 95 % intervals."
        blocks.append(by_measure(run, model, found, f"{caption} n counts questions.", suite_measure_title))
    if nothing:
        text = f"{model}: no arm finds anything in {listing(nothing)}: accuracy is 0 at every length. With {fewest:,}"
        blocks.append(
            Text(f"{text} questions or more at each, an accuracy below {format_value(open_below)} is not excluded.")
        )
    return blocks


def is_long_context(run: Run, suite: str) -> bool:
    """Whether a suite hides something in a context: one of ours that does, or any that is sliced by length or depth."""
    keys = [set(one.values) for model in run.models for one in run.measures(model, suite)]
    by_length = any({"length"} <= some <= {"length", "depth"} for some in keys)
    return suite in LONG_CONTEXT or (by_length and suite != "cost")


def is_needle(measure: Measure) -> bool:
    """Whether a value belongs to one cell of length and depth."""
    return {"length", "depth"} <= measure.values.keys()


def _suite_blocks(run: Run, suite: str) -> list[Block]:
    """Heat maps of each model where there are depths, and every value with its interval, folded."""
    blocks: list[Block] = []
    tables: list[Block] = []
    for model in run.models:
        measures = run.measures(model, suite)
        if not measures:
            blocks.append(Text(f"{model}: not run."))
            continue
        cells = [one for one in measures if is_needle(one)]
        blocks += _map_blocks(run, model, suite, cells)
        if not cells and (panels := slice_panels(run, model, suite, measures)):
            blocks.append(Figure(f"{suite_title(suite)}, {model}, by length, 95 % intervals.", panels))
        caption = f"{suite_title(suite)}, {model}, with 95 % intervals. n counts questions."
        tables.append(by_measure(run, model, measures, caption))
        if cells := [one for one in run.measures(model, suite, paired=True) if is_needle(one)]:
            caption = f"{suite_title(suite)}, {model}: paired differences, arm minus {cells[0].baseline}."
            tables.append(by_measure(run, model, cells, caption))
    folded: list[Block] = [Folded(f"{suite_title(suite)}: every value with its interval", tables)] if tables else []
    return blocks + folded


def _map_blocks(run: Run, model: str, suite: str, cells: list[Measure]) -> list[Block]:
    """A picture of each grid, except an accuracy that is 0 everywhere; other metrics are folded below accuracy."""
    grids = [grid for grid in _grids(run, model, suite, cells) if not grid.accuracy or any(_known(grid.arms))]
    blocks: list[Block] = [_maps(run, model, suite, grid) for grid in grids if grid.accuracy]
    others: list[Block] = [_maps(run, model, suite, grid) for grid in grids if not grid.accuracy]
    if not blocks:
        return others
    return [*blocks, Folded(f"{suite_title(suite)}, {model}: answer NLL", others)] if others else blocks


def _grids(run: Run, model: str, suite: str, cells: list[Measure]) -> list[Grid]:
    """The grids to draw: accuracy, and other metrics only where accuracy is near 0, for each value of the other
    keys."""
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
    n = counts.pop() if len(counts) == 1 else None
    return Grid(title, name, metric == "accuracy", lengths, depths, arms, n, cells)


def _maps(run: Run, model: str, suite: str, grid: Grid) -> Figure:
    baseline = run.baseline(model)
    changes = {
        arm: [[_minus(a, b) for a, b in zip(*pair)] for pair in zip(rows, grid.arms[baseline])]
        for arm, rows in grid.arms.items()
        if baseline is not None and run.kind(arm) in ("statex", "control")
    }
    known = _known(grid.arms) or [0.0]
    smallest, largest = (0.0, 1.0) if grid.accuracy else (min(known), max(known))
    columns, depths = [figures.short(n) for n in grid.lengths], [f"{depth:.2g}" for depth in grid.depths]
    plain = HeatMap(
        "", "length, tokens", "depth", columns, depths, [], smallest, largest, lower_is_better=not grid.accuracy
    )
    scale = max([_SMALLEST_SCALE, *(abs(value) for value in _known(changes))])
    signed = replace(plain, smallest=0.0, largest=scale, signed=True)
    panels = [_panel(replace(plain, title=arm, values=rows), grid, arm) for arm, rows in grid.arms.items()]
    for arm, rows in changes.items():
        outlined = _established(run, model, arm, str(baseline), grid)
        chart = replace(signed, title=f"{arm} − {baseline}", values=rows, outlined=outlined)
        panels.append(_panel(chart, grid, f"{arm}-minus-{baseline}"))
    n = f"n = {grid.n} questions in each cell" if grid.n is not None else "n of each cell in the folded tables"
    shades = "darker is higher" if grid.accuracy else "darker is higher, lower is better"
    caption = f"{suite_title(suite)}, {model}: {grid.title} by length and depth ({n}; {shades})."
    return Figure(caption, panels, small=len(grid.lengths) < _MANY_LENGTHS)


def _established(run: Run, model: str, arm: str, baseline: str, grid: Grid) -> frozenset[tuple[int, int]]:
    """(row, column) of the cells whose paired difference has an interval that excludes 0."""
    differences = [(cell, run.find(model, arm, replace(cell, baseline=baseline))) for cell in grid.cells]
    return frozenset(
        (grid.depths.index(cell.values["depth"]), grid.lengths.index(cell.values["length"]))
        for cell, difference in differences
        if above_zero(difference) is not None
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
