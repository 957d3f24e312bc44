"""The sections about quality: recall, needles, text, and any other suite."""

from dataclasses import replace

from statex.reporting import figures
from statex.reporting.content import Block, Figure, Folded, Heading, Panel, Section, Text
from statex.reporting.figures import HeatMap, Line, LineChart
from statex.reporting.run import Measure, Run, slice_key
from statex.reporting.tables import by_arm, by_measure
from statex.reporting.wording import measure_title, metric_title, slice_title, suite_title

NOTHING = Text("Not run.")
NEAR_ZERO = 0.2
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


def needle_blocks(run: Run, model: str, suite: str) -> list[Block]:
    """A needle suite of a model: heat maps per arm and against the baseline, a table by length, all cells folded."""
    measures = run.measures(model, suite)
    if not measures:
        return [NOTHING]
    blocks: list[Block] = []
    cells = [one for one in measures if {"length", "depth"} <= one.values.keys()]
    accuracies = [one for one in cells if one.metric == "accuracy"]
    found = [run.find(model, arm, one) for arm in run.arms(model) for one in accuracies]
    near_zero = all(one.result.value < NEAR_ZERO for one in found if one is not None)
    for metric in ["accuracy", "answer_nll"] if near_zero else ["accuracy"]:
        grid = [one for one in cells if one.metric == metric]
        if grid:
            blocks.append(_heat_maps(run, model, suite, metric, grid))
    by_length = [one for one in measures if "depth" not in one.values]
    if by_length:
        caption = f"{suite_title(suite)}, {model}: over all depths, with 95 % intervals. n counts questions."
        blocks.append(by_arm(run, model, by_length, caption, measure_title))
    if cells:
        caption = f"{suite_title(suite)}, {model}: every cell, with 95 % intervals."
        blocks.append(Folded("Every cell with its interval", [by_measure(run, model, cells, caption)]))
    return blocks


def _heat_maps(run: Run, model: str, suite: str, metric: str, grid: list[Measure]) -> Figure:
    baseline, title = run.baseline(model), metric_title(metric)
    lengths = sorted({one.values["length"] for one in grid})
    depths = sorted({one.values["depth"] for one in grid})
    extra = {key: value for key, value in grid[0].values.items() if key not in ("length", "depth")}
    values = {arm: _grid_values(run, model, arm, suite, metric, lengths, depths, extra) for arm in run.arms(model)}
    known = [value for rows in values.values() for row in rows for value in row if value is not None]
    smallest, largest = (0.0, 1.0) if metric == "accuracy" else (min(known, default=0.0), max(known, default=1.0))
    columns, rows_titles = [f"{n:,}" for n in lengths], [f"{depth:g}" for depth in depths]
    lower = metric != "accuracy"
    base = HeatMap("", "length, tokens", "depth", columns, rows_titles, [], smallest, largest, lower_is_better=lower)
    panels = []
    for arm, rows in values.items():
        panels.append(_heat_panel(replace(base, title=arm, values=rows), f"{suite}-{metric}-{model}-{arm}", title))
    changes = {
        arm: [[_minus(a, b) for a, b in zip(*pair)] for pair in zip(rows, values[baseline])]
        for arm, rows in values.items()
        if baseline is not None and run.kind(arm) in ("statex", "control")
    }
    sizes = [abs(value) for rows in changes.values() for row in rows for value in row if value is not None]
    largest = max([0.25, *sizes])
    for arm, rows in changes.items():
        chart = replace(base, title=f"{arm} − {baseline}", values=rows, smallest=0.0, largest=largest, signed=True)
        panels.append(_heat_panel(chart, f"{suite}-{metric}-{model}-{arm}-minus-{baseline}", title))
    counts = {one.result.n for measure in grid for arm in values if (one := run.find(model, arm, measure))}
    n = f"n = {counts.pop()} questions in each cell" if len(counts) == 1 else "n of each cell in the folded table"
    scale = "stronger is higher" if metric == "accuracy" else "in nats, stronger is higher, lower is better"
    caption = f"{suite_title(suite)}, {model}: {title} by length and depth ({n}; {scale}). "
    caption += "In the differences blue is better and orange worse. " * bool(changes) + "Intervals are in the tables."
    return Figure(caption, panels, small=True)


def _grid_values(run, model, arm, suite, metric, lengths, depths, extra) -> list[list[float | None]]:
    rows = []
    for depth in depths:
        keys = [Measure(suite, metric, slice_key({"length": length, "depth": depth} | extra)) for length in lengths]
        found = [run.find(model, arm, key) for key in keys]
        rows.append([None if one is None else one.result.value for one in found])
    return rows


def _heat_panel(chart: HeatMap, name: str, title: str) -> Panel:
    rows = ["; ".join("not run" if value is None else f"{value:.2f}" for value in row) for row in chart.values]
    words = [f"depth {depth}: {row}" for depth, row in zip(chart.rows, rows)]
    text = f"{chart.title}, {title} at lengths {', '.join(chart.columns)}. " + ". ".join(words)
    return Panel(name, figures.heat_map(chart), text)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


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
    if any({"length", "depth"} <= one.values.keys() for one in measures):
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
