"""The opening of a page: for each model a sentence and a picture of recall, one table, then the aims."""

from collections.abc import Sequence

from statex.reporting.render.content import Block, Column, Figure, PageSection, Table, TableCell, Text
from statex.reporting.render.tables import Shared, by_arm, shared_n
from statex.reporting.run import Measure, Run, Shown
from statex.reporting.sections.quality import nothing_measured, recall_panels
from statex.reporting.verdict import (
    Outcome,
    Verdict,
    hardest_recall,
    recall_difference,
    recall_outcome,
    relative_text_nll,
    text_measure,
    text_outcome,
    unfinished_sentences,
    verdict,
)
from statex.reporting.wording import (
    NOT_RUN,
    format_difference,
    format_percent_difference,
    format_value,
    listing,
    suite_measure_title,
)
from statex.results.claims import RECALL_MARGIN, TEXT_MARGIN

MARKS: dict[Outcome, str] = {"met": "✓", "not met": "✗", "undecided": "?", "not run": "–"}
RULES = (
    f"Judged by the 95 % interval of the paired difference. Recall at the most pairs: a gain where the interval is "
    f"above 0, none where it is below {RECALL_MARGIN:g}; the control is to have none. Text NLL: kept where the "
    f"interval is below {100 * TEXT_MARGIN:.0f} %, lost where it is above. Otherwise it is undecided."
)


def verdict_section(run: Run) -> PageSection:
    """A sentence for each model, recall against pairs, the arms in one table, and reservations."""
    verdicts = [verdict(run, model) for model in run.models]
    sentences = [*unfinished_sentences(run), nothing_measured(run), *(one.sentence for one in verdicts)]
    blocks: list[Block] = [Text(sentence, "lead") for sentence in sentences if sentence]
    blocks += [*_picture(run), arms_table(run)]
    remarks: dict[str, list[str]] = {}
    for one in verdicts:
        for remark in one.reservations:
            remarks.setdefault(remark, []).append(one.model)
    blocks += [Text(f"{listing(models)}: {remark}", "note") for remark, models in remarks.items()]
    if len(run.recipe.seeds) == 1:
        remark = (
            f"One training seed ({run.recipe.seeds[0]}): the intervals are over items only and say nothing about how "
            "another training run would have ended."
        )
        blocks.append(Text(remark, "note"))
    return PageSection("Verdict", blocks)


def summary_section(run: Run) -> PageSection:
    """For models that were only evaluated: recall as a picture, and the main values in one table."""
    (model,) = run.models
    measures = [hardest_recall(run, model), text_measure(run, model)]
    measures += run.measures(model, "cost", "decode_ms_per_token")[:1]
    known = [measure for measure in measures if measure is not None]
    if not known:
        return PageSection("Summary", [Text("Neither recall nor text nor cost was run; everything else follows.")])
    caption = "Recall at the most pairs, text and cost, with 95 % intervals."
    return PageSection("Summary", [*_picture(run), by_arm(run, model, known, caption, suite_measure_title)])


def aims_section(run: Run) -> PageSection | None:
    """Every aim with its outcome; None without aims."""
    verdicts = [verdict(run, model) for model in run.models]
    if not any(one.aims for one in verdicts):
        return None
    columns = [Column(title, words=True) for title in ("outcome", "model", "aim", "arm")] + [Column("difference")]
    rows = [
        [TableCell(text) for text in (f"{MARKS[aim.outcome]} {aim.outcome}", one.model, aim.aim, aim.arm, aim.measured)]
        for one in verdicts
        for aim in one.aims
    ]
    caption = RULES
    needed = [aim.needed for one in verdicts for aim in one.aims]
    if any(needed):
        caption += " The last column is what would establish a difference of the observed size in 4 of 5 such runs."
        columns.append(Column("to decide", words=True))
        rows = [[*row, TableCell(text or "–")] for row, text in zip(rows, needed)]
    return PageSection("Aims", [Text(aims_summary(verdicts)), Table(caption, columns, rows)])


def aims_summary(verdicts: Sequence[Verdict]) -> str:
    """How many aims are met, and which are not met or undecided; "" without aims."""
    aims = [(one.model, aim) for one in verdicts for aim in one.aims]
    if not aims:
        return ""
    parts = [f"**{sum(aim.outcome == 'met' for _, aim in aims)} of {len(aims)} aims are met.**"]
    for outcome in ("not met", "undecided", "not run"):
        names = [f"{aim.aim}, {model} {aim.arm}".rstrip(" –") for model, aim in aims if aim.outcome == outcome]
        if names:
            parts.append(f"{outcome.capitalize()}: {'; '.join(names)}.")
    return " ".join(parts)


def arms_table(run: Run) -> Table:
    """All arms of all models: recall and its difference, text, state and speed."""
    keys = [(model, arm) for model in run.models for arm in run.arms(model)]
    recall = [run.find(model, arm, measure) if (measure := hardest_recall(run, model)) else None for model, arm in keys]
    shared = Shared(recall)
    n = shared_n(recall)
    rows = [
        [
            TableCell(model),
            TableCell(arm),
            shared.cell(one, n_elsewhere=n is not None),
            _change_cell(run, model, arm, recall_difference(run, model, arm)),
            _text_cell(run, model, arm),
            *_cost_cells(run, model, arm),
        ]
        for (model, arm), one in zip(keys, recall)
    ]
    baselines = listing(sorted({str(run.baseline(model)) for model in run.models if run.baseline(model)}))
    columns = [
        Column("model", words=True),
        Column("arm", words=True),
        Column(_recall_title(run), "" if n is None else f"n = {n:,}"),
        Column(f"minus {baselines}" if baselines else "difference"),
        Column(f"text NLL against {baselines}" if baselines else "text NLL"),
        Column("state"),
        Column("training tokens/s"),
    ]
    caption = f"{shared.seeds_sentence()} Aims: ✓ met, ✗ not met, ? undecided; 95 % intervals.".strip()
    return Table(caption, columns, rows, shared.notes.lines())


def _recall_title(run: Run) -> str:
    hardest = [one for model in run.models if (one := hardest_recall(run, model))]
    pairs = sorted({one.values.get("num_pairs", 0) for one in hardest})
    return f"recall at {listing([str(count) for count in pairs])} pairs" if pairs else "recall"


def _picture(run: Run) -> list[Block]:
    """Recall against pairs, one panel a model, at the longest sequence where there are several."""
    panels = [panel for model in run.models for panel in recall_panels(run, model)[-1:]]
    caption = (
        "Recall against the number of key-value pairs (MQAR), 95 % intervals. The dotted line is the accuracy of "
        "guessing one of the values in the context, 1/pairs. Arms are slightly offset along the axis."
    )
    return [Figure(caption, panels)] if panels else []


def _change_cell(run: Run, model: str, arm: str, difference: Shown | None) -> TableCell:
    kind = run.kind(arm)
    if arm == run.baseline(model) or (difference is None and kind == "base"):
        return TableCell("–")
    outcome = recall_outcome(kind, difference) if kind in ("statex", "control") else None
    return _marked(format_difference(difference), outcome)


def _text_cell(run: Run, model: str, arm: str) -> TableCell:
    relative = relative_text_nll(run, model, arm)
    if arm == run.baseline(model) or (relative is None and run.kind(arm) == "base"):
        return TableCell("–")
    return _marked(format_percent_difference(relative), text_outcome(relative) if run.kind(arm) == "statex" else None)


def _marked(text: str, outcome: Outcome | None) -> TableCell:
    value, bracket, bounds = text.partition(" [")
    return TableCell(value, bracket.strip() + bounds, MARKS[outcome] if outcome else "")


def _cost_cells(run: Run, model: str, arm: str) -> list[TableCell]:
    state = run.find(model, arm, Measure("state", "state_bytes"))
    speed = run.find(model, arm, Measure("cost", "training_tokens_per_second"))
    baseline = run.baseline(model)
    before = run.find(model, baseline, Measure("state", "state_bytes")) if baseline else None
    times = f"× {state.result.value / before.result.value:.2f}" if state and before and before.result.value else ""
    untrained = "–" if run.kind(arm) == "base" else NOT_RUN
    return [
        TableCell(format_value(one.result.value, one.result.unit), beneath) if one else TableCell(missing)
        for one, beneath, missing in ((state, times, NOT_RUN), (speed, "", untrained))
    ]
