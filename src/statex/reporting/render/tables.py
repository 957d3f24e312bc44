"""Tables of estimates: built in one place, so that no table shows a mean without its n and interval."""

from collections.abc import Callable, Iterable, Sequence

from statex.reporting.render.content import Column, Table, TableCell
from statex.reporting.run import Measure, Run, Shown
from statex.reporting.verdict import above_zero
from statex.reporting.wording import (
    NOT_RUN,
    better,
    format_interval,
    format_needs,
    format_value,
    listing,
    measure_title,
    seeds,
)

Titles = Callable[[Measure], str]


class Notes:
    """Remarks on values, each written once below the table and marked by a letter."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def mark(self, remark: str) -> str:
        """The letter of a remark, "" for none."""
        if not remark:
            return ""
        if remark not in self.remarks:
            self.remarks.append(remark)
        return chr(ord("a") + self.remarks.index(remark) % 26)

    def lines(self) -> list[str]:
        return [f"{self.mark(remark)}: {remark}" for remark in self.remarks]


def by_arm(run: Run, model: str, measures: Sequence[Measure], caption: str, titles: Titles) -> Table:
    """A row for each arm and a column for each measure."""
    arms = run.arms(model)
    grid = [[run.find(model, arm, measure) for measure in measures] for arm in arms]
    shared = Shared(one for row in grid for one in row)
    counts = [shared_n(row[index] for row in grid) for index in range(len(measures))]
    beneath = ["" if n is None else f"n = {n:,}" for n in counts]
    columns = [Column("arm", words=True), *(Column(titles(one), n) for one, n in zip(measures, beneath))]
    rows = []
    for arm, estimates in zip(arms, grid):
        cells = [shared.cell(one, n_elsewhere=n is not None) for one, n in zip(estimates, counts)]
        rows.append([TableCell(arm), *cells])
    return Table(f"{caption} {shared.seeds_sentence()}".rstrip(), columns, rows, shared.notes.lines())


def by_measure(
    run: Run, model: str, measures: Sequence[Measure], caption: str, titles: Titles = measure_title
) -> Table:
    """A row for each measure and a column for each arm, except arms without any measure and the baselines."""
    subtracted = {measure.baseline for measure in measures}
    arms = [arm for arm in run.arms(model) if any(run.find(model, arm, measure) for measure in measures)]
    arms = [arm for arm in arms if arm not in subtracted]
    grid = [[run.find(model, arm, measure) for arm in arms] for measure in measures]
    shared = Shared(one for row in grid for one in row)
    rows = []
    for measure, estimates in zip(measures, grid):
        n = shared_n(estimates)
        cells = [shared.cell(one, n_elsewhere=n is not None) for one in estimates]
        rows.append([TableCell(titles(measure)), TableCell("" if n is None else f"{n:,}"), *cells])
    columns = [Column("measure", words=True), Column("n"), *(Column(arm) for arm in arms)]
    return Table(f"{caption} {shared.seeds_sentence()}".rstrip(), columns, rows, shared.notes.lines())


class Shared:
    """What the cells of one table have in common: their remarks, and their seeds where those are the same."""

    def __init__(self, estimates: Iterable[Shown | None]) -> None:
        self.notes = Notes()
        numbers = {one.seeds for one in estimates if one is not None}
        self.seeds = numbers.pop() if len(numbers) == 1 else None

    def seeds_sentence(self) -> str:
        """The training seeds, for the caption."""
        if self.seeds is None:
            return "Training seeds differ and are given in each cell."
        if not self.seeds:
            return ""
        return f"Training seed{'s' if len(self.seeds) > 1 else ''} {listing([str(seed) for seed in self.seeds])}."

    def cell(self, estimate: Shown | None, n_elsewhere: bool) -> TableCell:
        """A value with its interval, whatever the table does not state elsewhere, and marks; "not run" without one."""
        if estimate is None:
            return TableCell(NOT_RUN)
        row, paired = estimate.result, estimate.result.baseline is not None
        beneath = [format_interval(estimate, signed=paired)]
        if not n_elsewhere:
            beneath.append(f"n = {row.n:,}" if row.n is not None else "n not recorded")
        if self.seeds is None:
            beneath.append(f"seeds {seeds(estimate.seeds)}")
        marks = [self.notes.mark(row.note), _direction(estimate) if paired else ""]
        if paired and above_zero(estimate) is None and (needed := format_needs(row)):
            beneath.append(needed)
        text = format_value(row.value, row.unit, signed=paired)
        return TableCell(text, ", ".join(beneath), " ".join(mark for mark in marks if mark))


def _direction(difference: Shown) -> str:
    """Whether a difference is better or worse, "" where its interval includes 0 or its metric has no direction."""
    if above_zero(difference) is None:
        return ""
    return {True: "better", False: "worse", None: ""}[better(difference.result.metric, difference.result.value)]


def shared_n(estimates: Iterable[Shown | None]) -> int | None:
    """The n that all estimates have in common, None if they differ or have none."""
    counts = {estimate.result.n for estimate in estimates if estimate is not None}
    return counts.pop() if len(counts) == 1 else None
