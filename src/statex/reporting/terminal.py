"""A run's outcome on the terminal: the verdict, then a table of the arms with recall as bars, then the rest."""

from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from statex.reporting.run import Run, read_run
from statex.reporting.sections.opening import aims_summary, arms_table
from statex.reporting.sections.quality import nothing_measured
from statex.reporting.verdict import verdict
from statex.utils.markup import plain

BARS = "▁▂▃▄▅▆▇█"


def summary(folder: Path) -> list[RenderableType]:
    """What to print of a run's folder, in order.

    Raises:
        UserError: the folder has no recipe.toml or no results.jsonl.
    """
    run = read_run(Path(folder))
    verdicts = [verdict(run, model) for model in run.models]
    nothing = nothing_measured(run)
    sentences = [Text(sentence) for sentence in [nothing, *(plain(one.sentence) for one in verdicts)] if sentence]
    remarks = [f"{one.model}: {remark}" for one in verdicts for remark in one.reservations]
    return [*sentences, _table(run), *(Text(plain(text)) for text in (aims_summary(verdicts), *remarks) if text)]


def _table(run: Run) -> Table:
    """The page's table of arms, with a bar for recall at each number of pairs."""
    arms = arms_table(run)
    titles = [escape(f"{column.title}\n{column.beneath}".strip()) for column in arms.columns]
    table = Table(*titles[:2], "recall by pairs", *titles[2:], title=run.recipe.name, caption=escape(arms.caption))
    keys = [(model, arm) for model in run.models for arm in run.arms(model)]
    for (model, arm), row in zip(keys, arms.rows):
        cells = [Text(f"{one.mark} {one.text}".strip() + f"\n{one.beneath}".rstrip()) for one in row]
        table.add_row(*cells[:2], _bars(run, model, arm), *cells[2:], end_section=arm == run.arms(model)[-1])
    return table


def _bars(run: Run, model: str, arm: str) -> str:
    found = [run.find(model, arm, measure) for measure in run.measures(model, "mqar", "accuracy")]
    return "".join("·" if one is None else BARS[min(7, max(0, int(8 * one.result.value)))] for one in found)
