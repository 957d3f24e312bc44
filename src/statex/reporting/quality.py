"""The sections about quality: recall, needles, text, and any other suite."""

from statex.reporting import figures
from statex.reporting.content import Block, Figure, Folded, Heading, Panel, Section, Text
from statex.reporting.figures import Line, LineChart
from statex.reporting.needles import is_needle, needle_blocks
from statex.reporting.run import Measure, Run
from statex.reporting.tables import by_arm, by_measure
from statex.reporting.wording import measure_title, metric_title, slice_title, suite_title

NOTHING = Text("Not run.")
OWN_SECTIONS = {"mqar", "passkey", "ar_hits", "nll_by_position", "state", "cost", "run"}


def recall_section(run: Run) -> Section:
    """Accuracy against the number of pairs, as a figure and as a table, for each model."""
    blocks: list[Block] = []
    panels = []
    for model in run.models:
        measures = run.measures(model, "mqar", "accuracy")
        blocks.append(Heading(model))
        if not measures:
            blocks.append(NOTHING)
            continue
        panels += _recall_panels(run, model, measures)
        titles = _pairs_with_length if len({one.values.get("length") for one in measures}) > 1 else _pairs
        caption = f"Recall of {model}: accuracy at the queried positions, with 95 % intervals. n counts sequences."
        blocks.append(by_arm(run, model, measures, caption, titles))
    if panels:
        caption = (
            "Recall against the number of key-value pairs (MQAR), 95 % intervals. The dotted line is what guessing one "
            "of the values of the context gives, 1/pairs. Arms are moved apart a little along the axis."
        )
        blocks.insert(0, Figure(caption, panels))
    return Section("Recall", blocks)


def _pairs(measure: Measure) -> str:
    return f"{measure.values.get('num_pairs')} pairs"


def _pairs_with_length(measure: Measure) -> str:
    length = measure.values.get("length")
    return _pairs(measure) + (f", {length:,} tokens" if length is not None else "")


def _recall_panels(run: Run, model: str, measures: list[Measure]) -> list[Panel]:
    """One panel, or one for each length where a number of pairs was asked at several lengths."""
    pairs = [measure.values.get("num_pairs") for measure in measures]
    lengths = sorted({measure.values.get("length", 0) for measure in measures})
    groups = {"": measures}
    if len(set(pairs)) < len(pairs):
        groups = {f", {n:,} tokens": [one for one in measures if one.values.get("length", 0) == n] for n in lengths}
    panels = []
    for suffix, group in groups.items():
        chart = LineChart(
            x_label="pairs",
            y_label=f"{model}{suffix}: accuracy",
            lines=arm_lines(run, model, group, "num_pairs"),
            fraction=True,
            guess=("1/pairs", lambda pairs: 1 / pairs),
        )
        name = f"recall-{model}" + suffix.replace(", ", "-").replace(" ", "-").replace(",", "")
        panels.append(Panel(name, figures.line_chart(chart), described(chart)))
    return panels


def arm_lines(run: Run, model: str, measures: list[Measure], key: str) -> list[Line]:
    """A line for each arm that has any of the measures, over one key of their slices ("from"-"to": the middle)."""
    lines = []
    for arm in run.arms(model):
        found = [(measure, run.find(model, arm, measure)) for measure in measures]
        points = [(_position(measure, key), estimate) for measure, estimate in found if estimate is not None]
        if points:
            x = [position for position, _ in points]
            y = [estimate.result.value for _, estimate in points]
            lines.append(Line(arm, run.kind(arm), x, y, [estimate.interval for _, estimate in points]))
    return lines


def _position(measure: Measure, key: str) -> float:
    values = measure.values
    return (values["from"] + values["to"]) / 2 if key == "from" else values[key]


def described(chart: LineChart) -> str:
    """What a line chart shows, in words, for readers who cannot see it."""
    ends = [f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in chart.lines]
    return f"{chart.y_label} against {chart.x_label}: " + "; ".join(ends)


def paired_section(run: Run) -> Section:
    """All differences between arms on the same items, except those of needle cells and of positions."""
    blocks: list[Block] = [
        Text(
            "Each figure is an arm minus the arm without expansion, on the same items; the 95 % interval is of the "
            "difference. *better* and *worse* stand only where that interval excludes 0; where it does not, *n needed* "
            "is how many items would show a difference of this size with 80 % power."
        )
    ]
    for model in run.models:
        blocks.append(Heading(model))
        measures = [one for suite in run.suites(model) for one in run.measures(model, suite, paired=True)]
        measures = [one for one in measures if not {"depth", "from"} & one.values.keys()]
        if not measures:
            blocks.append(NOTHING)
            continue
        baselines = " or ".join(sorted({str(measure.baseline) for measure in measures}))
        caption = f"Paired differences of {model}: arm minus {baselines}."
        blocks.append(by_measure(run, model, measures, caption, _paired_title))
    return Section("Paired differences", blocks)


def _paired_title(measure: Measure) -> str:
    short = {"mqar": "MQAR", "ar_hits": "AR-hits", "nll_by_position": "by position", "passkey": "passkey"}
    return f"{short.get(measure.suite, measure.suite)}: {measure_title(measure)}"


def passkey_section(run: Run) -> Section:
    """Passkey by length and depth."""
    blocks: list[Block] = []
    for model in run.models:
        blocks += [Heading(model), *needle_blocks(run, model, "passkey")]
    return Section("Passkey", blocks)


def text_section(run: Run) -> Section:
    """Text quality: NLL on recalled and on other tokens, and NLL by position."""
    blocks: list[Block] = []
    panels = [panel for model in run.models for panel in _position_panels(run, model)]
    for model in run.models:
        blocks.append(Heading(model))
        hits = run.measures(model, "ar_hits")
        if hits:
            caption = (
                f"Held-out text, {model}: NLL in nats a token over all tokens, on tokens that repeat a bigram of the "
                "context (AR-hits) and on the others, with 95 % intervals. Lower is better. n counts documents."
            )
            order = ["nll", "hit_nll", "other_nll", "long_gap_nll", "hit_share"]
            hits.sort(key=lambda one: order.index(one.metric) if one.metric in order else len(order))
            blocks.append(by_arm(run, model, hits, caption, measure_title))
        else:
            blocks.append(Text("AR-hits: not run."))
        positions = run.measures(model, "nll_by_position")
        if positions:
            caption = f"NLL by position, {model}, in nats a token, with 95 % intervals. n counts documents."
            tables: list[Block] = [by_measure(run, model, positions, caption)]
            if paired := run.measures(model, "nll_by_position", paired=True):
                caption = f"Paired differences of NLL by position, {model}: arm minus {paired[0].baseline}."
                tables.append(by_measure(run, model, paired, caption))
            blocks.append(Folded(f"NLL by position of {model}, as tables", tables))
        else:
            blocks.append(Text("NLL by position: not run."))
    if panels:
        caption = (
            "NLL by position in the document, 95 % intervals, and beside it the paired difference from the arm without "
            "expansion. The dotted border is the training length: a recurrent model may run past it."
        )
        blocks.insert(0, Figure(caption, panels))
    return Section("Text", blocks)


def _position_panels(run: Run, model: str) -> list[Panel]:
    panels = []
    longest = run.recipe.training.sequence_length
    for paired in (False, True):
        measures = [one for one in run.measures(model, "nll_by_position", "nll", paired) if "from" in one.values]
        if not measures:
            continue
        past = any(one.values["to"] > longest for one in measures)
        what = f"NLL minus {measures[0].baseline}, nats" if paired else "NLL, nats a token"
        chart = LineChart(
            x_label="position",
            y_label=f"{model}: {what}",
            lines=arm_lines(run, model, measures, "from"),
            logarithmic=_spread(measures) > 20,
            limit=("training length", longest) if past else None,
            ticks=sorted({one.values[end] for one in measures for end in ("from", "to")} - {0}),
            zero=paired,
        )
        name = f"nll-by-position-{model}" + ("-difference" if paired else "")
        panels.append(Panel(name, figures.line_chart(chart), described(chart)))
    return panels


def _spread(measures: list[Measure]) -> float:
    """How many times the last position is the first."""
    middles = [_position(one, "from") for one in measures]
    return max(middles) / max(1.0, min(middles))


def other_sections(run: Run) -> list[Section]:
    """A section for each suite that has no section of its own: heat maps for needles, a line figure for one number."""
    suites = dict.fromkeys(suite for model in run.models for suite in run.suites(model) if suite not in OWN_SECTIONS)
    wanted = [suite for suite in run.recipe.evaluation.suites if suite not in suites and suite not in OWN_SECTIONS]
    sections = []
    for suite in [*suites, *wanted]:
        blocks: list[Block] = []
        for model in run.models:
            blocks += [Heading(model), *_other_blocks(run, model, suite)]
        sections.append(Section(suite_title(suite), blocks))
    return sections


def _other_blocks(run: Run, model: str, suite: str) -> list[Block]:
    measures = run.measures(model, suite)
    if not measures:
        return [NOTHING]
    if any(is_needle(one) for one in measures):
        return needle_blocks(run, model, suite)
    blocks: list[Block] = []
    panels = _slice_panels(run, model, suite, measures)
    if panels:
        blocks.append(Figure(f"{suite_title(suite)}, {model}, 95 % intervals.", panels))
    caption = f"{suite_title(suite)}, {model}, with 95 % intervals."
    return [*blocks, by_measure(run, model, measures, caption)]


def _slice_panels(run: Run, model: str, suite: str, measures: list[Measure]) -> list[Panel]:
    """A line figure for each metric (and each value of the other keys) that was measured at three or more numbers."""
    groups: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        values = measure.values
        for key in [key for key, value in values.items() if isinstance(value, int | float)][:1]:
            rest = slice_title({name: value for name, value in values.items() if name != key})
            groups.setdefault((measure.metric, key, rest), []).append(measure)
    panels = []
    for (metric, key, rest), group in groups.items():
        if len(group) < 3:
            continue
        title = f"{model}: {metric_title(metric)}" + (f", {rest}" if rest else "")
        lines = arm_lines(run, model, group, key)
        chart = LineChart(key.replace("_", " "), title, lines, fraction=metric == "accuracy")
        name = "-".join(f"{suite}-{model}-{metric}-{rest}".strip("-").replace(",", "").split())
        panels.append(Panel(name, figures.line_chart(chart), described(chart)))
    return panels
