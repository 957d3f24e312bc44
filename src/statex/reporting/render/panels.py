"""From a run's results to drawings: which arms and points, and the same in words."""

from statex.reporting.render import figures
from statex.reporting.render.content import Panel
from statex.reporting.render.figures import Dot, DotChart, Line, LineChart
from statex.reporting.run import Measure, Run
from statex.reporting.wording import format_with_interval, metric_title, slice_title
from statex.results.suites import SUITES


def arm_lines(run: Run, model: str, measures: list[Measure], key: str) -> list[Line]:
    """A line for each arm that has any of the measures, over one key of their slices ("from"-"to": the middle)."""
    lines = []
    for arm in run.arms(model):
        found = [(measure, run.find(model, arm, measure)) for measure in measures]
        points = [(position(measure, key), estimate) for measure, estimate in found if estimate is not None]
        if points:
            x = [place for place, _ in points]
            y = [estimate.result.value for _, estimate in points]
            intervals = [estimate.interval for _, estimate in points]
            lines.append(Line(arm, run.kind(arm), x, y, intervals, run.rank(model, arm)))
    return lines


def position(measure: Measure, key: str) -> float:
    """The position of a measure on the axis of one key of its slice."""
    values = measure.values
    return (values["from"] + values["to"]) / 2 if key == "from" else values[key]


def line_panel(name: str, chart: LineChart) -> Panel:
    """A line chart with every point in words, for readers who cannot see it."""
    return Panel(name, figures.line_chart(chart), in_words(chart))


def in_words(chart: LineChart) -> str:
    """A line chart's every point."""
    words = []
    for line in chart.lines:
        starts = [""] * len(line.x) if line.starts is None else [f"{start:.3g} to " for start in line.starts]
        points = [f"{start}{value:.3g} at {figures.short(x)}" for x, value, start in zip(line.x, line.y, starts)]
        words.append(f"{line.name}: {', '.join(points)}")
    return f"{chart.y_label} against {chart.x_label}. " + "; ".join(words)


def dot_panel(
    run: Run, model: str, measure: Measure, name: str, title: str, *, zero: bool = False, from_zero: bool = False
) -> Panel | None:
    """A dot chart of one measure of all arms that have it, None if no arm has it; differences have a line at 0."""
    paired, dots = measure.baseline is not None, []
    for arm in run.arms(model):
        if one := run.find(model, arm, measure):
            bounds, printed = one.interval or one.spread, format_with_interval(one, signed=paired)
            dots.append(Dot(arm, run.kind(arm), run.rank(model, arm), one.result.value, bounds, printed))
    if not dots:
        return None
    words = "; ".join(f"{dot.name} {dot.printed}" for dot in dots)
    chart = DotChart(title, dots, zero or paired, from_zero)
    return Panel(name, figures.dot_chart(chart), f"{title}: {words}")


def slice_panels(
    run: Run, model: str, suite: str, measures: list[Measure], level: tuple[str, float] | None = None
) -> list[Panel]:
    """A line chart for each metric (and each value of the other keys) that was measured at three or more numbers."""
    groups: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        values = measure.values
        for key in [key for key, value in values.items() if isinstance(value, int | float)][:1]:
            rest = slice_title({name: value for name, value in values.items() if name != key})
            groups.setdefault((measure.metric, key, rest), []).append(measure)
    panels = []
    metrics = list(dict.fromkeys(metric for metric, _, _ in groups))
    for metric, key, rest in sorted(groups, key=lambda one: (metrics.index(one[0]), one[2])):
        group = groups[metric, key, rest]
        if len(group) < 3:
            continue
        name = "" if suite in SUITES else f"{suite} "
        title = f"{model}: {name}{metric_title(metric)}" + (f", {rest}" if rest else "")
        lines = arm_lines(run, model, group, key)
        chart = LineChart(key.replace("_", " "), title, lines, fraction=metric == "accuracy", level=level)
        name = "-".join(f"{suite}-{model}-{metric}-{rest}".strip("-").replace(",", "").split())
        panels.append(line_panel(name, chart))
    return panels
