"""Tables of estimates: one builder, so that no table shows a mean without its n and interval."""

from collections.abc import Callable, Sequence

from statex.reporting.content import Cell, Column, Table
from statex.reporting.run import Estimate, Measure, Run
from statex.reporting.verdict import above_zero
from statex.reporting.wording import NOT_RUN, better, figure, interval, measure_title, metric_title, seeds, slice_title

Titles = Callable[[Measure], str]


class Notes:
    """Remarks beside figures, each written once under the table and marked by a letter."""

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
    """A row for each arm and a column for each measure, with the seeds behind each row."""
    notes, arms = Notes(), run.arms(model)
    shown = {(arm, measure): run.find(model, arm, measure) for arm in arms for measure in measures}
    columns, shared = [Column("arm", words=True)], []
    for measure in measures:
        shared.append(shared_n([shown[arm, measure] for arm in arms]))
        columns.append(Column(titles(measure), f"n = {shared[-1]:,}" if shared[-1] is not None else ""))
    columns.append(Column("seeds"))
    rows = []
    for arm in arms:
        estimates = [shown[arm, measure] for measure in measures]
        cells = [estimate_cell(one, notes, n is not None) for one, n in zip(estimates, shared)]
        numbers = sorted({seed for one in estimates if one for seed in one.seeds})
        rows.append([Cell(arm), *cells, Cell(seeds(tuple(numbers)))])
    return Table(caption, columns, rows, notes.lines())


def by_measure(
    run: Run, model: str, measures: Sequence[Measure], caption: str, titles: Titles = measure_title
) -> Table:
    """A row for each measure and a column for each arm that has any of them."""
    notes = Notes()
    arms = [arm for arm in run.arms(model) if any(run.find(model, arm, measure) for measure in measures)]
    subtracted = {measure.baseline for measure in measures}
    arms = [arm for arm in arms if arm not in subtracted]
    columns = [Column("measure", words=True), Column("n"), *(Column(arm) for arm in arms)]
    rows = []
    for measure in measures:
        estimates = [run.find(model, arm, measure) for arm in arms]
        n = shared_n(estimates)
        cells = [estimate_cell(one, notes, n is not None) for one in estimates]
        rows.append([Cell(titles(measure)), Cell("" if n is None else f"{n:,}"), *cells])
    return Table(caption, columns, rows, notes.lines())


def long_form(run: Run, model: str, measures: Sequence[Measure], caption: str) -> Table:
    """A row for each arm and measure, for slices that differ from arm to arm or are many."""
    notes, rows = Notes(), []
    for measure in measures:
        for arm in run.arms(model):
            if estimate := run.find(model, arm, measure):
                where = [Cell(metric_title(measure.metric)), Cell(slice_title(measure.values)), Cell(arm)]
                n = estimate.result.n
                cell = estimate_cell(estimate, notes, n is not None)
                rows.append([*where, cell, Cell("–" if n is None else f"{n:,}")])
    words = [Column(title, words=True) for title in ("metric", "slice", "arm")]
    return Table(caption, [*words, Column("value"), Column("n")], rows, notes.lines())


def estimate_cell(estimate: Estimate | None, notes: Notes, n_elsewhere: bool) -> Cell:
    """A figure with its interval, its n unless the table tells it elsewhere, and marks; "not run" without one."""
    if estimate is None:
        return Cell(NOT_RUN)
    row = estimate.result
    paired = row.baseline is not None
    beneath = interval(estimate, signed=paired)
    if not n_elsewhere:
        beneath += f", n = {row.n:,}" if row.n is not None else ", n not recorded"
    marks = [notes.mark(row.note)]
    if paired and above_zero(estimate) is not None:
        marks.append({True: "better", False: "worse", None: ""}[better(row.metric, row.value)])
    return Cell(figure(row.value, row.unit, signed=paired), beneath, " ".join(mark for mark in marks if mark))


def shared_n(estimates: Sequence[Estimate | None]) -> int | None:
    """The n that all estimates have in common, None if they differ or have none."""
    counts = {estimate.result.n for estimate in estimates if estimate is not None}
    return counts.pop() if len(counts) == 1 else None
