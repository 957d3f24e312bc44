"""Drawings as SVG. Arms differ in marker and line style as well as in colour, and heat maps show their numbers."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

INK, MUTED, GRID, PAPER, HEAT, GAIN, LOSS = "#1b1d22", "#62666f", "#dcdad3", "#ffffff", "#174a7c", "#1f5f9e", "#b5541c"
_STATEX = [
    ("#0b62a8", "s", "-"),
    ("#c8441b", "D", "--"),
    ("#1c7f5c", "P", (0, (5, 1, 1, 1))),
    ("#8a3f9c", "^", (0, (3, 1.5))),
    ("#9b5c3a", "*", "-."),
]
_KINDS = {
    "base": ("#8a8d94", "x", ":"),
    "lpt": ("#1b1d22", "o", "-"),
    "control": ("#a87400", "v", "-."),
}
_LEGEND_COLUMNS = 3
_MOST_TICKS = 9
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "statex",  # the same drawing is the same file
    "text.parse_math": False,
    "font.size": 11.5,
    "legend.fontsize": 11.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Line:
    """One arm of a line chart: points with their intervals (None where there is none).

    Args:
        rank: the arm's place among the expanded ones of its run, by which it is drawn the same everywhere.
        starts: if given, a thin stem leads from a hollow mark here to each point, instead of an interval.
    """

    name: str
    kind: str
    x: list[float]
    y: list[float]
    intervals: list[tuple[float, float] | None]
    rank: int = 0
    starts: list[float] | None = None


@dataclass(frozen=True)
class LineChart:
    """Arms against a number.

    `guess` is a label and the accuracy of guessing as a function of x, `level` a label and a reference height, `limit`
    a label and a border on the x axis; `zero` draws a line at 0, `from_zero` starts the y axis there; `ticks` are for
    the x axis, by default at the points.
    """

    x_label: str
    y_label: str
    lines: list[Line]
    logarithmic: bool = True
    fraction: bool = False
    guess: tuple[str, Callable[[float], float]] | None = None
    level: tuple[str, float] | None = None
    limit: tuple[str, float] | None = None
    zero: bool = False
    from_zero: bool = False
    ticks: list[float] | None = None


@dataclass(frozen=True)
class Dot:
    """One arm of a dot chart: its value, its interval, and both in print."""

    name: str
    kind: str
    rank: int
    value: float
    interval: tuple[float, float] | None
    printed: str


@dataclass(frozen=True)
class DotChart:
    """One value of each arm, in rows; `zero` draws a line at 0, `from_zero` starts the axis there."""

    title: str
    dots: list[Dot]
    zero: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A grid of numbers from `smallest` to `largest`; a cell that is None was not run.

    `signed` is for differences: gains and losses have their own colours, and 0 has none. Cells in `outlined`, as
    (row, column), have a border.
    """

    title: str
    x_label: str
    y_label: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    smallest: float
    largest: float
    signed: bool = False
    lower_is_better: bool = False
    outlined: frozenset[tuple[int, int]] = frozenset()


def line_chart(chart: LineChart) -> str:
    """A line chart as SVG, 420 px wide."""
    with matplotlib.rc_context(_STYLE):
        width, height = 420, 290 + 17 * _legend_rows(chart)
        drawing = _canvas(width, height)
        _draw_chart(drawing, chart, width, height)
        return _svg(drawing)


def line_charts(title: str, beneath: str, rows: Sequence[Sequence[LineChart]], remark: str, description: str) -> str:
    """Line charts in rows as one SVG, with a title and a subtitle above them and a remark below."""
    with matplotlib.rc_context(_STYLE):
        charts = [chart for row in rows for chart in row]
        columns = max([2, *map(len, rows)])
        width, height = 444, 314 + 17 * max(map(_legend_rows, charts), default=0)
        head, foot = 70, 30 * bool(remark)
        whole = width * columns, head + height * len(rows) + foot
        drawing = _canvas(*whole)
        drawing.text(2 / whole[0], 1 - 26 / whole[1], title, fontsize=17, fontweight="bold")
        drawing.text(2 / whole[0], 1 - 46 / whole[1], beneath, fontsize=12, color=MUTED)
        drawing.text(2 / whole[0], 12 / whole[1], remark, fontsize=12)
        ratios = [head, *[height] * len(rows), max(foot, 1)]
        grid = drawing.add_gridspec(len(ratios), columns, height_ratios=ratios, hspace=0, wspace=0)
        grid.update(left=0, right=1, top=1, bottom=0)
        for y, row in enumerate(rows, start=1):
            for x, chart in enumerate(row):
                _draw_chart(drawing.add_subfigure(grid[y, x]), chart, width, height)
        return _svg(drawing, description)


def heat_map(chart: HeatMap) -> str:
    """A heat map with its numbers as SVG, 236 px wide (at least 420 with five columns or more)."""
    width = 236 if len(chart.columns) < 5 else max(420, 48 + 36 * len(chart.columns))
    with matplotlib.rc_context(_STYLE):
        height = 70 + 28 * len(chart.rows)
        drawing = _canvas(width, height)
        axes = _axes(drawing, width, height, left=44, right=4, bottom=40, top=30)
        for y, row in enumerate(chart.values):
            for x, value in enumerate(row):
                _draw_cell(axes, chart, x, y, value)
        axes.set_xlim(0, len(chart.columns))
        axes.set_ylim(len(chart.rows), 0)
        axes.set_xticks([x + 0.5 for x in range(len(chart.columns))], chart.columns)
        axes.set_yticks([y + 0.5 for y in range(len(chart.rows))], chart.rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.set_title(chart.title, loc="left", fontweight="bold", pad=8)
        return _svg(drawing)


def dot_chart(chart: DotChart) -> str:
    """A dot chart as SVG, 420 px wide, each arm's value printed on the right."""
    names, printed = (max(map(len, texts)) for texts in zip(*((dot.name, dot.printed) for dot in chart.dots)))
    left, right = min(150, 14 + 7 * names), min(200, 16 + 6 * printed)
    with matplotlib.rc_context(_STYLE):
        height = 60 + 27 * len(chart.dots)
        drawing = _canvas(420, height)
        axes = _axes(drawing, 420, height, left=left, right=right, bottom=28, top=32)
        for y, dot in enumerate(chart.dots):
            colour, marker, _ = arm_style(dot.kind, dot.rank)
            if dot.interval:
                axes.plot(dot.interval, [y, y], color=colour, linewidth=1.8, solid_capstyle="butt", zorder=2)
            axes.plot([dot.value], [y], color=colour, marker=marker, zorder=3, clip_on=False, **_marker(colour, marker))
            axes.text(
                1, y, "  " + dot.printed, transform=axes.get_yaxis_transform(), ha="left", va="center", fontsize=10.5
            )
        if chart.zero:
            axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
        axes.set_ylim(len(chart.dots) - 0.5, -0.5)
        axes.set_yticks(range(len(chart.dots)), [dot.name for dot in chart.dots])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
        if chart.from_zero:
            axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        numbers = axes.xaxis.get_major_formatter().format_ticks(list(axes.get_xticks()))
        if sum(7 * len(number) + 14 for number in numbers) > 420 - left - right:
            axes.xaxis.set_major_locator(MaxNLocator(2))  # else the numbers would overlap
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        drawing.text(0, 1, chart.title, ha="left", va="top", fontweight="bold", fontsize=12.5)
        return _svg(drawing)


def arm_style(kind: str, rank: int) -> tuple[str, str, object]:
    """Colour, marker and line style of an arm: by its kind or, for expanded arms, by its rank."""
    return _KINDS.get(kind) or _STATEX[rank % len(_STATEX)]


def _canvas(width: int, height: int) -> Figure:
    """An empty figure of this size in CSS pixels (a point of the SVG is taken as one)."""
    drawing = Figure(figsize=(width / 72, height / 72), facecolor=PAPER)
    FigureCanvasSVG(drawing)
    return drawing


def _axes(drawing: FigureBase, width: int, height: int, left: int, right: int, bottom: int, top: int) -> Axes:
    """Axes with margins in pixels of a figure, or a part of one, of this size."""
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return drawing.add_axes(box)


def _svg(drawing: Figure, description: str | None = None) -> str:
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Description": description}
    drawing.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def _legend_rows(chart: LineChart) -> int:
    num_labels = len(chart.lines) + sum(map(bool, (chart.guess, chart.level, chart.limit)))
    return math.ceil(num_labels / _LEGEND_COLUMNS)


def _draw_chart(drawing: FigureBase, chart: LineChart, width: int, height: int) -> None:
    axes = _axes(drawing, width, height, left=50, right=14, bottom=42, top=34 + 17 * _legend_rows(chart))
    for index, line in enumerate(chart.lines):
        _draw_line(axes, line, arm_style(line.kind, line.rank), _dodge(index, chart))
    _draw_references(axes, chart)
    _x_axis(axes, chart)
    if chart.fraction:
        axes.set_ylim(-0.03, 1.05)
    elif chart.from_zero:
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.set_xlabel(chart.x_label)
    axes.set_title(chart.y_label, loc="left", fontweight="bold", pad=10)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    drawing.legend(
        loc="upper left", bbox_to_anchor=(0, 1), ncols=_LEGEND_COLUMNS, frameon=False, handlelength=2.6,
        borderaxespad=0, borderpad=0.2, labelspacing=0.35, columnspacing=1.6,
    )  # fmt: skip


def _draw_references(axes: Axes, chart: LineChart) -> None:
    """References for the arms: the accuracy of guessing, a level, a border, a line at 0."""
    dotted: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 2)), "zorder": 1}
    if chart.guess:
        label, accuracy = chart.guess
        points = _points(chart)
        axes.plot(points, [accuracy(x) for x in points], label=label, **dotted)
    if chart.level:
        label, height = chart.level
        axes.axhline(height, label=label, **dotted)
    if chart.limit:
        label, border = chart.limit
        axes.axvline(border, label=label, **dotted)
    if chart.zero:
        axes.axhline(0, color=MUTED, linewidth=1, zorder=1)


def _x_axis(axes: Axes, chart: LineChart) -> None:
    points = _points(chart)
    if len(points) == 1:
        axes.set_xlim(points[0] - 1, points[0] + 1)
    elif chart.logarithmic:
        axes.set_xscale("log", base=2)
    ticks = chart.ticks or points
    ticks = ticks[:: -math.ceil(len(ticks) / _MOST_TICKS)][::-1]
    places = [_place(x, chart) for x in ticks]
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [short(x) for x in ticks])


def _points(chart: LineChart) -> list[float]:
    return sorted({x for line in chart.lines for x in line.x})


def _place(x: float, chart: LineChart) -> float:
    """The position of a number on the axis: on a logarithmic one, 0 is drawn at half of the smallest other number."""
    if not chart.logarithmic or x > 0:
        return x
    return min((point for point in _points(chart) if point > 0), default=1.0) / 2


def short(x: float) -> str:
    """A number short enough for an axis: 64K for 65,536."""
    if x >= 1024 and x % 1024 == 0:
        return f"{x / 1024:g}K"
    return f"{x:,.6g}"


def _draw_line(axes: Axes, line: Line, style: tuple, dodge: Callable[[float], float]) -> None:
    colour, marker, dashes = style
    x = [dodge(value) for value in line.x]
    axes.plot(
        x, line.y, color=colour, marker=marker, linestyle=dashes, linewidth=1.8, label=line.name, clip_on=False,
        zorder=3, **_marker(colour, marker),
    )  # fmt: skip
    if line.starts is not None:
        axes.vlines(x, line.starts, line.y, color=colour, linewidth=1, zorder=2)
        axes.plot(
            x, line.starts, color=colour, marker=marker, linestyle="none", markersize=6, markerfacecolor=PAPER,
            markeredgewidth=1.2, clip_on=False, zorder=3,
        )  # fmt: skip
        return
    for position, bounds in zip(x, line.intervals):
        if bounds:
            axes.plot([position, position], bounds, color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)


def _marker(colour: str, marker: str) -> dict[str, Any]:
    """Style of a marker: filled ones have a white border; a cross is nothing but border."""
    cross = marker == "x"
    return {
        "markersize": 6.5,
        "markeredgecolor": colour if cross else PAPER,
        "markeredgewidth": 1.6 if cross else 0.8,
    }


def _dodge(index: int, chart: LineChart) -> Callable[[float], float]:
    """Move the arms a little apart, so that their intervals do not overlap."""
    shift = index - (len(chart.lines) - 1) / 2
    if chart.logarithmic:
        return lambda x: _place(x, chart) * 2 ** (0.045 * shift)
    gap = min((b - a for a, b in pairwise(_points(chart))), default=1.0)
    return lambda x: x + 0.07 * gap * shift


def _draw_cell(axes: Axes, chart: HeatMap, x: int, y: int, value: float | None) -> None:
    if value is None or not math.isfinite(value):
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=GRID, hatch="///", linewidth=0, clip_on=False))
        axes.text(
            x + 0.5, y + 0.5, "not run" if value is None else "NaN", ha="center", va="center", color=MUTED, fontsize=9
        )
        return
    span = chart.largest - chart.smallest
    share = min(1.0, ((abs(value) if chart.signed else value) - chart.smallest) / span) if span > 0 else 0.0
    gain = (value >= 0) != chart.lower_is_better
    colour = (GAIN if gain else LOSS) if chart.signed else HEAT
    axes.add_patch(
        Rectangle(
            (x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, alpha=0.06 + 0.94 * share, linewidth=0, clip_on=False
        )
    )
    if (y, x) in chart.outlined:
        axes.add_patch(
            Rectangle((x + 0.06, y + 0.08), 0.88, 0.84, fill=False, edgecolor=INK, linewidth=1.4, clip_on=False)
        )
    sign = "+" if chart.signed and round(value, 2) else ""
    text = format(round(value, 2) or 0.0, f"{sign}.2f").replace("-", "−")
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=PAPER if share > 0.62 else INK)
