"""A run's outcome on the terminal: one table of the arms, and the verdict's sentences with their reservations."""

import re
from pathlib import Path

from rich.table import Table

from statex.reporting.quality import nothing_measured
from statex.reporting.run import Estimate, Measure, Run, read_run
from statex.reporting.verdict import hardest_recall, text_measure, verdict
from statex.reporting.wording import figure, interval


def show_run(folder: Path) -> tuple[Table, list[str]]:
    """The table and the sentences for a run's folder.

    Raises:
        UserError: the folder has no recipe.toml or no results.jsonl.
    """
    run = read_run(Path(folder))
    table = Table("model", "arm", "recall", "text NLL", "state", "training tokens/s", title=run.recipe.name)
    for model in run.models:
        for arm in run.arms(model):
            columns = [
                _shown(run, model, arm, hardest_recall(run, model)),
                _shown(run, model, arm, text_measure(run, model)),
                _shown(run, model, arm, Measure("state", "state_bytes")),
                _shown(run, model, arm, Measure("cost", "training_tokens_per_second")),
            ]
            table.add_row(model, arm, *columns)
        table.add_section()
    nothing = nothing_measured(run)
    sentences = [nothing] if nothing else []
    for one in (verdict(run, model) for model in run.models):
        remarks = [f"{one.model}: {remark}" for remark in one.reservations]
        sentences += [_plain(text) for text in (one.sentence, *remarks)]
    return table, sentences


def _plain(text: str) -> str:
    """A report's text without its marks and links."""
    return re.sub(r"\[([^\]]+)\]\(#[^)]+\)", r"\1", text.replace("**", ""))


def _shown(run: Run, model: str, arm: str, measure: Measure | None) -> str:
    estimate: Estimate | None = run.find(model, arm, measure) if measure is not None else None
    if estimate is None:
        return "not run"
    value = figure(estimate.result.value, estimate.result.unit)
    return f"{value} {interval(estimate)}" if estimate.interval else value
