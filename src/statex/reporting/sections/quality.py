"""The sections about quality: recall, text, in-context learning, any other suite, and all paired differences."""

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
from statex.reporting.render.panels import arm_lines, line_panel, position, slice_panels
from statex.reporting.render.tables import by_arm, by_measure
from statex.reporting.run import Measure, Run
from statex.reporting.sections.needles import is_long_context
from statex.reporting.wording import (
    listing,
    measure_title,
    suite_measure_title,
)
from statex.results.suites import SUITES

NOTHING = Text("Not run.")
NO_SUITES = {"state", "cost", "run", "diagnostics"}
"""Names in results that are not requested suites."""
OWN_SECTIONS = NO_SUITES | {name for name, entry in SUITES.items() if entry.section != "other"}
ICL = "symbol_icl"


def recall_section(run: Run) -> PageSection:
    """Accuracy by the number of pairs as tables; the main picture opens the page, those of shorter sequences are
    here."""
    blocks: list[Block] = []
    for model in run.models:
        measures = run.measures(model, "mqar", "accuracy")
        blocks.append(Heading(model))
        if not measures:
            blocks.append(NOTHING)
            continue
        if panels := recall_panels(run, model)[:-1]:
            blocks.append(Figure(f"Recall of {model} in shorter sequences, 95 % intervals.", panels))
        titles = _pairs_with_length if len({one.values.get("length") for one in measures}) > 1 else _pairs
        caption = f"Recall of {model}: accuracy at the queried positions, with 95 % intervals. n counts sequences."
        blocks.append(by_arm(run, model, measures, caption, titles))
    return PageSection("Recall", blocks)


def _pairs(measure: Measure) -> str:
    return f"{measure.values.get('num_pairs')} pairs"


def _pairs_with_length(measure: Measure) -> str:
    length = measure.values.get("length")
    return _pairs(measure) + (f", {length:,} tokens" if length is not None else "")


def recall_panels(run: Run, model: str) -> list[Panel]:
    """One panel or, where a number of pairs was measured at several lengths, one per length, the longest last."""
    measures = run.measures(model, "mqar", "accuracy")
    pairs = [measure.values.get("num_pairs") for measure in measures]
    lengths = sorted({measure.values.get("length", 0) for measure in measures})
    groups = {"": measures} if measures else {}
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
        panels.append(line_panel(name, chart))
    return panels


def paired_section(run: Run) -> PageSection:
    """All differences between arms on the same items, except those of needle cells and of positions."""
    blocks: list[Block] = [
        Text(
            "Each value is an arm minus the arm without expansion, on the same items; the 95 % interval is of the "
            "difference. *better* and *worse* appear only where that interval excludes 0; elsewhere, the number of "
            "items is given that would establish a difference of this size in 4 of 5 such runs with the same seeds or, "
            "where the variance between seeds is too large for any number of items, the number of seeds."
        )
    ]
    for model in run.models:
        suites = [suite for suite in run.suites(model) if suite != "diagnostics"]
        measures = [one for suite in suites for one in run.measures(model, suite, paired=True)]
        measures = [one for one in measures if not {"depth", "from"} & one.values.keys()]
        if not measures:
            blocks.append(Text(f"{model}: not run."))
            continue
        baselines = " or ".join(sorted({str(measure.baseline) for measure in measures}))
        caption = f"Paired differences of {model}: arm minus {baselines}."
        table = by_measure(run, model, measures, caption, suite_measure_title)
        blocks.append(Folded(f"Paired differences of {model}: {len(measures)} measures", [table]))
    return PageSection("Paired differences", blocks)


def text_section(run: Run) -> PageSection:
    """Text quality: NLL on recalled and on other tokens, and NLL by position."""
    blocks: list[Block] = []
    panels = [panel for model in run.models for panel in _position_panels(run, model)]
    for model in run.models:
        blocks.append(Heading(model))
        hits = run.measures(model, "ar_hits")
        if hits:
            caption = (
                f"Held-out text, {model}: NLL in nats per token over all tokens, on tokens that repeat {_ngram(run)} "
                "of the context, rare elsewhere (AR-hits), and on the others, with 95 % intervals. Lower is better. n "
                "counts documents."
            )
            order = ["nll", "hit_nll", "other_nll", "long_gap_nll", "hit_share"]
            hits.sort(key=lambda one: order.index(one.metric) if one.metric in order else len(order))
            blocks.append(by_arm(run, model, hits, caption, measure_title))
        else:
            blocks.append(Text("AR-hits: not run."))
        positions = run.measures(model, "nll_by_position")
        if positions:
            caption = f"NLL by position, {model}, in nats per token, with 95 % intervals. n counts documents."
            tables: list[Block] = [by_measure(run, model, positions, caption)]
            if paired := run.measures(model, "nll_by_position", paired=True):
                caption = f"Paired differences of NLL by position, {model}: arm minus {paired[0].baseline}."
                tables.append(by_measure(run, model, paired, caption))
            blocks.append(Folded(f"NLL by position of {model}, as tables", tables))
        else:
            blocks.append(Text("NLL by position: not run."))
    if panels:
        compared = any(run.measures(model, "nll_by_position", paired=True) for model in run.models)
        caption = (
            "NLL by position in the document, 95 % intervals"
            + ", and beside it the paired difference from the arm without expansion" * compared
            + ". A dotted border is the training length, which a recurrent model may exceed."
        )
        blocks.insert(0, Figure(caption, panels))
    return PageSection("Text", blocks)


def _ngram(run: Run) -> str:
    """The n-grams that AR-hits looked for, from its results."""
    sizes = {details["ngram"] for details in run.details("ar_hits", "nll") if "ngram" in details}
    return f"{listing([str(size) for size in sorted(sizes)])} consecutive tokens" if sizes else "an n-gram"


def _position_panels(run: Run, model: str) -> list[Panel]:
    panels = []
    longest = run.recipe.training.sequence_length
    for paired in (False, True):
        measures = [one for one in run.measures(model, "nll_by_position", "nll", paired) if "from" in one.values]
        if not measures:
            continue
        past = any(one.values["to"] > longest for one in measures)
        what = f"NLL minus {measures[0].baseline}, nats" if paired else "NLL, nats per token"
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
        panels.append(line_panel(name, chart))
    return panels


def _spread(measures: list[Measure]) -> float:
    """The ratio of the last position to the first."""
    middles = [position(one, "from") for one in measures]
    return max(middles) / max(1.0, min(middles))


def icl_section(run: Run) -> PageSection | None:
    """Accuracy by the number of shots; None where it was not requested."""
    found = dict.fromkeys(suite for model in run.models for suite in run.suites(model) if _has_shots(run, suite))
    suites = [*found, *({ICL} & set(run.asked) - set(found))]
    if not suites:
        return None
    chance = 1 / run.recipe.evaluation.suite(ICL).num_labels
    blocks: list[Block] = [
        Text(
            "Symbols are classified from examples in the context (shots), and their labels are arbitrary. Seen symbols "
            "are among the shots and can be recalled; unseen ones share the deciding syllable with some of them."
        )
    ]
    caption = (
        "Accuracy of {} by the number of shots, 95 % intervals. The dotted line is guessing one of the labels. Arms "
        "are slightly offset along the axis."
    )
    for model in run.models:
        measures = [one for suite in suites for one in run.measures(model, suite)]
        blocks.append(Heading(model))
        if not measures:
            blocks.append(NOTHING)
            continue
        panels = []
        for suite in suites:
            own = run.measures(model, suite)
            by_symbols = [one for one in own if "symbols" in one.values]
            level = ("guessing", chance) if suite == ICL else None
            panels += slice_panels(run, model, suite, by_symbols or own, level)
        blocks += [Figure(caption.format(model), panels)] if panels else []
        words = f"In-context learning of {model}, with 95 % intervals. n counts contexts, or questions."
        table = by_measure(run, model, measures, words, suite_measure_title)
        blocks.append(Folded(f"In-context learning of {model}, as a table", [table]))
    return PageSection("In-context learning", blocks)


def _has_shots(run: Run, suite: str) -> bool:
    """Whether a suite is sliced by the number of shots: ours, or a task of lm-eval."""
    return any("shots" in one.values for model in run.models for one in run.measures(model, suite))


def other_section(run: Run) -> PageSection | None:
    """Every suite without its own section, in one table per model; None without any."""
    blocks: list[Block] = []
    for model in run.models:
        suites = [suite for suite in run.suites(model) if suite not in OWN_SECTIONS]
        suites = [suite for suite in suites if not _has_shots(run, suite) and not is_long_context(run, suite)]
        measures = [one for suite in suites for one in run.measures(model, suite)]
        if not measures:
            continue
        blocks.append(Heading(model))
        if panels := [
            panel for suite in suites for panel in slice_panels(run, model, suite, run.measures(model, suite))
        ]:
            blocks.append(Figure(f"Other measures of {model}, 95 % intervals.", panels))
        caption = f"Other measures of {model}, with 95 % intervals."
        blocks.append(by_measure(run, model, measures, caption, suite_measure_title))
    return PageSection("Other measures", blocks) if blocks else None


def nothing_measured(run: Run) -> str:
    """A sentence where no suite has a value, "" where one has or the run is not finished."""
    if run.unfinished or "cost" in run.asked or any(row.suite not in NO_SUITES for row in run.results):
        return ""
    if not run.recipe.evaluation.suites:
        return "Nothing was measured: the recipe's evaluation.suites names no suite."
    return "Nothing was measured: none of the requested suites and tasks could be run."


def not_run_section(run: Run) -> PageSection | None:
    """Tasks of lm-eval without results, with the commands that fetch what is missing; None without any."""
    tasks = {task["task"]: task for details in run.details("run", "not_run") for task in details["tasks"]}
    if not tasks:
        return None
    rows = [[TableCell(task[key]) for key in ("task", "reason", "command")] for task in tasks.values()]
    columns = [Column(title, words=True) for title in ("task", "reason", "command that fetches it")]
    caption = "Requested tasks that could not be run; they are left out, never counted as 0."
    return PageSection("Not run", [Table(caption, columns, rows)])
