"""A run's outcome on the terminal: one table of the arms, and the verdict's sentences."""

from pathlib import Path

from rich.table import Table

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
    sentences = [verdict(run, model).sentence.replace("**", "") for model in run.models]
    return table, sentences


def _shown(run: Run, model: str, arm: str, measure: Measure | None) -> str:
    estimate: Estimate | None = run.find(model, arm, measure) if measure is not None else None
    if estimate is None:
        return "not run"
    value = figure(estimate.result.value, estimate.result.unit)
    return f"{value} {interval(estimate)}" if estimate.interval else value
