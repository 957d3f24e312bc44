"""The section about how expanded arms use their expansion: signs of failure, use of the new state."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from statex.reporting.render.content import (
    Block,
    Column,
    Figure,
    Folded,
    Heading,
    PageSection,
    Panel,
    Table,
    TableCell,
    Text,
)
from statex.reporting.render.figures import LineChart
from statex.reporting.render.panels import arm_lines, dot_panel, line_panel
from statex.reporting.render.tables import by_measure
from statex.reporting.run import Measure, Run, Shown
from statex.reporting.verdict import hardest_recall, recall_difference, recall_outcome, signatures, text_measure
from statex.reporting.wording import (
    format_difference,
    format_interval,
    format_needs,
    format_number,
    format_value,
    format_with_interval,
    listing,
    measure_title,
)
from statex.utils.markup import literal

SUITE = "diagnostics"
TITLE = "Diagnosis"
WHERE_DRAWN = {"text_lost": "[Text](#Text)", "recall_flat": "[Recall](#Recall)"}


def diagnosis_section(run: Run) -> PageSection:
    """For each model, the signs of failure with the numbers that show them, then the use of the new state."""
    blocks: list[Block] = []
    for model in run.models:
        blocks += [Heading(model), *_model_blocks(run, model)]
    return PageSection(TITLE, blocks)


def _model_blocks(run: Run, model: str) -> list[Block]:
    if not run.arms_of_kind(model, "statex"):
        return [Text("No arm was expanded.")]
    if not run.measures(model, SUITE):
        return [
            Text("Not run. Repeat `statex run` with the same recipe to add it; nothing is trained or evaluated again.")
        ]
    blocks: list[Block] = [*_signs(run, model)]
    if panels := [panel for panel in _sign_panels(run, model) if panel]:
        caption = (
            "Paired differences of all arms, 95 % intervals: an expansion fails where recall does not rise, where text "
            "NLL does, or where the accuracy of a common-sense task falls. In full: "
            f"{listing([*WHERE_DRAWN.values()][::-1])}."
        )
        blocks.append(Figure(caption, panels))
    return [*blocks, *_use(run, model)]


def _signs(run: Run, model: str) -> list[Text]:
    """Sentences on each sign of failure, what is undecided, and the smallest failure that could be detected."""
    found = signatures(run, model)
    sentences = [_sign(run, model, arm, measure, note) for arm, measure, note in found]
    if not found:
        sentences.append(f"**No sign of failure** is established in {listing(run.arms_of_kind(model, 'statex'))}.")
    sentences += [*_undecided(run, model), *_detectable(run, model)]
    return [Text(sentence) for sentence in sentences]


def _sign(run: Run, model: str, arm: str, measure: Measure, note: str) -> str:
    """A sign's sentence; where recall is flat, also whether the new entries are in use."""
    sentence = literal(re.sub(r"-(?=[0-9])", "−", note))
    in_use = _in_use(run, model, arm) if measure.metric == "recall_flat" else ""
    return f"**{measure.metric.replace('_', ' ').capitalize()}, {arm}.** {sentence}{in_use}"


def _in_use(run: Run, model: str, arm: str) -> str:
    """Whether recall needs the new entries."""
    for measure in run.measures(model, SUITE, "recall_drop_without_new_state"):
        if drop := run.find(model, arm, measure):
            change = format_with_interval(drop.scaled(-1), signed=True)
            in_use = drop.interval is not None and drop.interval[0] > 0
            use = (
                "they are in use, whether or not they raise recall"
                if in_use
                else "nothing shows that recall needs them"
            )
            return f" Zeroing the new entries changes recall by {change}: {use}."
    return ""


def _undecided(run: Run, model: str) -> Iterator[str]:
    """The arms with neither a gain of recall nor its absence established, and what would decide it."""
    for arm in run.arms_of_kind(model, "statex"):
        difference = recall_difference(run, model, arm)
        if recall_outcome("statex", difference) == "undecided" and difference is not None:
            needed = format_needs(difference.result)
            decide = f" To establish a difference of this size: {needed}." if needed else ""
            yield f"**Undecided, {arm}.** Recall changed by {format_difference(difference)}: a gain is neither " + (
                f"established nor ruled out.{decide}"
            )


def _detectable(run: Run, model: str) -> Iterator[str]:
    """The smallest failure that this run could have detected, over the expanded arms."""
    parts = []
    for measure, what, unit, items in (
        (text_measure(run, model), "a rise of text NLL by", " nats", "documents"),
        (hardest_recall(run, model), "a change of recall by", "", "sequences"),
    ):
        arms = run.arms_of_kind(model, "statex")
        paired = [run.find(model, arm, replace(measure, baseline=run.baseline(model))) for arm in arms if measure]
        rows = [one.result for one in paired if one is not None]
        if sizes := [size for row in rows if (size := (row.details.get("power") or {}).get("detectable")) is not None]:
            size = f"{format_value(max(sizes))}{unit}" if unit or max(sizes) < 1 else "more than is possible"
            parts.append(f"{what} {size} (n = {rows[0].n:,} {items})")
    if parts:
        yield f"Smallest failure this run could detect (80 % power): {listing(parts)}."


def _sign_panels(run: Run, model: str) -> Iterator[Panel | None]:
    """The differences that may show a sign of failure: recall, text, and common-sense tasks that do."""
    recall = hardest_recall(run, model)
    pairs = "" if recall is None else recall.values.get("num_pairs")
    yield _difference_panel(run, model, recall, "recall", f"recall at {pairs} pairs")
    yield _difference_panel(run, model, text_measure(run, model), "text", "text NLL, nats,")
    for of in dict.fromkeys(str(measure.values.get("of", "")) for _, measure, _ in signatures(run, model)):
        suite, _, metric = of.partition(" ")
        if suite and suite not in ("mqar", "ar_hits", "nll_by_position"):
            yield _difference_panel(run, model, Measure(suite, metric), suite, f"{suite} {metric}")


def _difference_panel(run: Run, model: str, measure: Measure | None, name: str, what: str) -> Panel | None:
    baseline = run.baseline(model)
    if measure is None or baseline is None:
        return None
    title = f"{model}: {what} minus {baseline}"
    return dot_panel(run, model, replace(measure, baseline=baseline), f"diagnosis-{name}-{model}", title)


def _use(run: Run, model: str) -> list[Block]:
    """How each arm uses its new state and fresh parameters: sentences, pictures by layer, and tables."""
    arms = [arm for kind in ("statex", "control") for arm in run.arms_of_kind(model, kind)]
    blocks: list[Block] = [Text(sentence) for arm in arms if (sentence := _use_sentence(run, model, arm))]
    if panels := _panels(run, model):
        caption = (
            "By layer: the new entries' share of the energy (the sum of squares) of the state after half a window of "
            "held-out text; the state's effective rank (exp of the entropy of its singular values), hollow: with its "
            "new entries zeroed; and the norm of the change of fresh tensors in training over their norm, 0 where "
            "they did not change. Last, the drop of recall when the new entries are zeroed before the queries. Where "
            "heads were merged, the new entries are the blocks in which one old head's keys meet another's values; "
            "the rest of the state can have a higher rank than the whole."
        )
        blocks.append(Figure(caption, panels))
    if panels := [*_training_panels(run, model)]:
        caption = (
            "While the arms trained: the new entries' share of the state's energy and its effective rank after one "
            "sequence, always the same, by training step; means over the expanded layers."
        )
        blocks.append(Figure(caption, panels))
    return [*blocks, Folded(f"Diagnosis of {model}, as tables", _tables(run, model))]


def _use_sentence(run: Run, model: str, arm: str) -> str:
    parts = []
    energy = _by_layer(run, model, arm, "new_state_energy")
    if energy:
        share = energy[0].result.details.get("share_of_entries")
        entries = f", {_percent(share)} of the state," if isinstance(share, float) else ""
        parts.append(f"the new entries{entries} hold {_range(energy, _percent)} of its energy")
    changes = [_zeroed(run, model, arm, *change) for change in ZEROED]
    if any(changes):
        parts.append(f"zeroing them changes {listing([change for change in changes if change])}")
    if moved := _by_layer(run, model, arm, "weight_change"):
        parts.append(f"its fresh tensors moved by {_range(moved, _percent)} of their norm")
    notes = sorted(
        {
            f"layer {row.slice['layer']}: {row.note.removeprefix('not moved at all: ')}"
            for row in run.results
            if (row.suite, row.metric, row.model, row.arm) == (SUITE, "weight_change", model, arm) and row.note
        }
    )
    if not parts:
        return ""
    still = f" **Not moved at all**: {listing([literal(note) for note in notes])}." if notes else ""
    return f"**{arm}**: {'; '.join(parts)}.{still}"


ZEROED = [
    ("nll_rise_without_new_state", "text NLL", " nats", "documents", 1),
    ("recall_drop_without_new_state", "recall", "", "sequences", -1),
]
"""Metric, the quantity that changes, its unit, what n counts, and 1 for a rise or -1 for a fall."""


def _zeroed(run: Run, model: str, arm: str, metric: str, what: str, unit: str, items: str, sign: int) -> str:
    for measure in run.measures(model, SUITE, metric):
        if estimate := run.find(model, arm, measure):
            pairs = measure.values.get("num_pairs")
            where = "" if pairs is None else f" at {pairs} pairs"
            change = format_with_interval(estimate.scaled(sign), signed=True)
            value, _, bounds = change.partition(" ")
            return f"{what}{where} by {value}{unit} {bounds} (n = {estimate.result.n} {items})"
    return ""


def _by_layer(run: Run, model: str, arm: str, metric: str) -> list[Shown]:
    found = [run.find(model, arm, measure) for measure in run.measures(model, SUITE, metric)]
    return [one for one in found if one is not None]


def _range(estimates: list[Shown], form: Callable[[float], str]) -> str:
    """The smallest and largest value over layers, "a" where both read the same, else "a to b"."""
    values = [one.result.value for one in estimates]
    ends = list(dict.fromkeys([form(min(values)), form(max(values))]))
    return " to ".join(ends)


def _percent(share: float) -> str:
    return f"{format_number(float(f'{100 * share:.2g}'))} %"


BY_LAYER = {
    "new_state_energy": "energy in the new entries",
    "effective_rank": "effective rank of the state",
    "effective_rank_without_new_state": "the same, new entries zeroed",
    "weight_change": "how far fresh tensors moved",
}


def _panels(run: Run, model: str) -> list[Panel]:
    """Energy, rank and weight change by layer (or by arm, for a single layer), and the drop of recall."""
    layers = {one.values["layer"] for metric in BY_LAYER for one in run.measures(model, SUITE, metric)}
    panels: list[Panel | None] = [*(_layer_dots if len(layers) == 1 else _layer_lines)(run, model)]
    for measure in run.measures(model, SUITE, "recall_drop_without_new_state"):
        title = f"{model}: drop of recall, new entries zeroed"
        panels.append(dot_panel(run, model, measure, f"diagnosis-emptied-{model}", title, zero=True))
    return [panel for panel in panels if panel is not None]


def _layer_dots(run: Run, model: str) -> Iterator[Panel | None]:
    for metric, title in BY_LAYER.items():
        for measure in run.measures(model, SUITE, metric):
            title = f"{model}: {title}, layer {measure.values['layer']}"
            yield dot_panel(run, model, measure, f"diagnosis-{metric}-{model}", title, from_zero=True)


def _layer_lines(run: Run, model: str) -> Iterator[Panel]:
    by_metric = {metric: arm_lines(run, model, run.measures(model, SUITE, metric), "layer") for metric in BY_LAYER}
    starts = {line.name: line.y for line in by_metric.pop("effective_rank_without_new_state")}
    shares = {
        float(row.details["share_of_entries"])
        for row in run.results
        if (row.suite, row.metric, row.model) == (SUITE, "new_state_energy", model)
    }
    for metric, lines in by_metric.items():
        chart = LineChart("layer", f"{model}: {BY_LAYER[metric]}", lines, logarithmic=False, from_zero=True)
        if metric == "new_state_energy" and shares:
            level = ("share of the entries", shares.pop()) if len(shares) == 1 else None
            chart = replace(chart, fraction=True, level=level)
        if metric == "effective_rank":
            chart = replace(chart, lines=[replace(line, starts=starts.get(line.name)) for line in lines])
        if lines:
            yield line_panel(f"diagnosis-{metric}-{model}", chart)


IN_TRAINING = {
    "new_state_energy_in_training": "energy in the new entries",
    "effective_rank_in_training": "effective rank of the state",
}


def _training_panels(run: Run, model: str) -> Iterator[Panel]:
    """Energy and rank by step, where they were recorded."""
    for metric, title in IN_TRAINING.items():
        if lines := arm_lines(run, model, run.measures(model, SUITE, metric), "step"):
            chart = LineChart("step", f"{model}: {title}", lines, logarithmic=False, from_zero=True)
            chart = replace(chart, fraction=metric == "new_state_energy_in_training")
            yield line_panel(f"diagnosis-{metric}-{model}", chart)


def _tables(run: Run, model: str) -> list[Block]:
    tables: list[Block] = []
    measures = [one for one in run.measures(model, SUITE) if one.metric not in ("weight_change", *IN_TRAINING)]
    if measures:
        caption = f"New state of {model}, with 95 % intervals. n counts documents, or sequences of recall."
        tables.append(by_measure(run, model, measures, caption))
    if moved := run.measures(model, SUITE, "weight_change"):
        tables.append(_moved_table(run, model, moved))
    return tables


def _moved_table(run: Run, model: str, measures: list[Measure]) -> Table:
    arms = [arm for arm in run.arms(model) if _by_layer(run, model, arm, "weight_change")]
    rows = []
    for measure in measures:
        found = [run.find(model, arm, measure) for arm in arms]
        rows.append([TableCell(measure_title(measure)), *map(_moved_cell, found)])
    caption = (
        f"Fresh tensors of {model}: norm of their change in training over their norm. It is computed from all their "
        "values, so it has no interval; below it is the range over seeds."
    )
    return Table(caption, [Column("measure", words=True), *(Column(arm) for arm in arms)], rows)


def _moved_cell(estimate: Shown | None) -> TableCell:
    if estimate is None:
        return TableCell("–")
    return TableCell(format_value(estimate.result.value), format_interval(estimate) if estimate.spread else "")
