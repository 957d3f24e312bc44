"""The sections about cost and origin: state and parameters, speed and memory, seeds, versions, recipe."""

from statex.reporting.render.content import (
    Block,
    Code,
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
from statex.reporting.render.panels import dot_panel
from statex.reporting.render.tables import Notes, shared_n
from statex.reporting.run import Measure, Run, Shown, slice_key
from statex.reporting.wording import NOT_RUN, format_interval, format_value, listing, measure_title, seeds
from statex.utils.markup import literal

COSTS = [
    "training_tokens_per_second",
    "training_peak_memory",
    "training_data_wait",
    "prefill_tokens_per_second",
    "decode_ms_per_token",
    "decode_graph_ms_per_token",
    "seconds",
]


def state_section(run: Run) -> PageSection:
    """State and parameters of each arm before and after, and layer by layer."""
    blocks: list[Block] = []
    for model in run.models:
        blocks.append(Heading(model))
        if not run.measures(model, "state"):
            blocks.append(Text("Not run."))
            continue
        blocks.append(_state_table(run, model))
        if (layers := _layer_table(run, model)).rows:
            blocks.append(Folded(f"Layers of {model}", [layers]))
    return PageSection("State and parameters", blocks)


def _state_table(run: Run, model: str) -> Table:
    titles = ["state elements before", "after", "factor", "state bytes", "parameters", "change", "fresh parameters"]
    reference = run.baseline(model) or next(iter(run.arms_of_kind(model, "base")), None)
    rows = []
    for arm in run.arms(model):
        after = _count(run, model, arm, "state_elements")
        before = elements_before(run, model, arm)
        parameters = _count(run, model, arm, "parameters")
        without = _count(run, model, reference, "parameters") if reference else None
        factor = f"× {after / before:.2f}" if after and before else "–"
        change = "–" if parameters is None or not without else _change(parameters / without - 1)
        size, fresh = (
            _plain(run.find(model, arm, Measure("state", name))) for name in ("state_bytes", "fresh_parameters")
        )
        cells = [_whole(before), _whole(after), factor, size, _whole(parameters), change, fresh]
        rows.append([TableCell(arm), *(TableCell(text) for text in cells)])
    caption = (
        f"State and parameters of {model}: matrix states at batch 1. The change of parameters is against "
        f"{reference or 'no arm'}; fresh parameters belong to tensors that the expansion changed or created. "
        "These are counts, so they have no interval."
    )
    return Table(caption, [Column("arm", words=True), *(Column(title) for title in titles)], rows)


def elements_before(run: Run, model: str, arm: str) -> int | None:
    """The state elements of an arm's model before expansion, from its layers, else from an arm that is not expanded."""
    layers = [
        run.find(model, arm, one) for one in run.measures(model, "state", "state_elements") if "layer" in one.values
    ]
    before = [one.result.details.get("elements_before") for one in layers if one is not None]
    known = [count for count in before if isinstance(count, int)]
    if before and len(known) == len(before):
        return sum(known)
    for other in [*run.arms_of_kind(model, "base"), *run.arms_of_kind(model, "lpt")]:
        if (count := _count(run, model, other, "state_elements")) is not None:
            return count
    return None


def _layer_table(run: Run, model: str) -> Table:
    rows = []
    measures = [one for one in run.measures(model, "state", "state_elements") if "layer" in one.values]
    for arm in run.arms(model):
        for measure in measures:
            if estimate := run.find(model, arm, measure):
                details = estimate.result.details
                before, after = details.get("elements_before"), int(estimate.result.value)
                shape = [_whole(details.get(name)) for name in ("num_heads", "key_dim", "value_dim")]
                factor = f"× {after / before:.2f}" if before else "–"
                texts = [arm, str(measure.values["layer"]), *shape, _whole(before), _whole(after), factor]
                rows.append([TableCell(text) for text in texts])
    titles = ["layer", "heads", "key dim", "value dim", "elements before", "after", "factor"]
    return Table(
        f"State of {model}, layer by layer.", [Column("arm", words=True), *(Column(one) for one in titles)], rows
    )


def cost_section(run: Run) -> PageSection:
    """Speed, memory and time of each arm."""
    blocks: list[Block] = [Text(f"Measured on {literal(listing(devices(run))) or 'an unnamed device'}.")]
    for model in run.models:
        blocks.append(Heading(model))
        measures = run.measures(model, "cost")
        if not measures:
            blocks.append(Text("Not run."))
            continue
        if panels := _cost_panels(run, model, measures):
            caption = f"Cost of {model}: 95 % intervals over repetitions, or the range over seeds."
            blocks.append(Figure(caption, panels))
        blocks.append(_cost_table(run, model, measures))
    return PageSection("Cost", blocks)


def _cost_table(run: Run, model: str, measures: list[Measure]) -> Table:
    notes = Notes()
    extra = [row.arm for row in run.results if row.model == model and row.suite == "cost"]
    arms = list(dict.fromkeys([*run.arms(model), *extra]))
    rows = []
    for measure in sorted(measures, key=lambda one: COSTS.index(one.metric) if one.metric in COSTS else len(COSTS)):
        found = {arm: run.find(model, arm, measure) for arm in arms}
        n = shared_n(found.values())
        cells = [_cost_cell(one, notes, n, _applies(run, arm, measure)) for arm, one in found.items()]
        rows.append([TableCell(measure_title(measure)), TableCell("" if n is None else f"{n:,}"), *cells])
    columns = [Column("measure", words=True), Column("n"), *(Column(arm or "all arms") for arm in arms)]
    caption = (
        f"Cost of {model}. Below a value is its 95 % interval or, where it was measured once for each seed, the "
        "range over seeds; a value with neither was measured once. n counts the repetitions for a seed."
    )
    return Table(caption, columns, rows, notes.lines())


def _cost_panels(run: Run, model: str, measures: list[Measure]) -> list[Panel]:
    """State, training speed, prefill of the longest prompt and decoding of the smallest batch."""
    speeds = [one for one in measures if one.metric == "training_tokens_per_second"]
    prefill = [one for one in measures if one.metric == "prefill_tokens_per_second"]
    decode = [one for one in measures if one.metric == "decode_ms_per_token"]
    panels = []
    for measure in [Measure("state", "state_bytes"), *speeds[:1], *prefill[-1:], *decode[:1]]:
        title = f"{model}: {measure_title(measure)}"
        panels.append(dot_panel(run, model, measure, f"cost-{measure.metric}-{model}", title, from_zero=True))
    return [panel for panel in panels if panel is not None]


def _applies(run: Run, arm: str, measure: Measure) -> bool:
    """Whether an arm can have such a cost: the base is not post-trained, the other arms are not pre-trained."""
    if measure.values.get("stage") == "pretrain":
        return run.kind(arm) == "base"
    return run.kind(arm) != "base" or not (
        measure.metric.startswith("training") or measure.values.get("stage") == "train"
    )


def _cost_cell(estimate: Shown | None, notes: Notes, shared: int | None, applies: bool) -> TableCell:
    if estimate is None:
        return TableCell(NOT_RUN if applies else "–")
    row = estimate.result
    beneath = [format_interval(estimate)] if estimate.interval or estimate.spread else []
    if shared is None and row.n is not None:
        beneath.append(f"n = {row.n:,}")
    return TableCell(format_value(row.value, row.unit), ", ".join(beneath), notes.mark(row.note))


def devices(run: Run) -> list[str]:
    """The devices on which anything was measured."""
    return list(dict.fromkeys(row.device for row in run.results if row.device))


def origin_section(run: Run) -> PageSection:
    """Seeds, versions, device and commit, as needed to repeat the run."""
    commits = list(dict.fromkeys(row.commit for row in run.results if row.commit))
    dtypes = list(dict.fromkeys(row.dtype for row in run.results if row.dtype))
    trained = [] if run.evaluation_only else [("training seeds", seeds(tuple(run.recipe.seeds)))]
    facts = [
        *trained,
        ("seed of the evaluation items", str(run.recipe.evaluation.seed)),
        ("device", listing(devices(run)) or "not recorded"),
        ("dtype of the measured models", listing(dtypes) or "not recorded"),
        ("commit", listing(commits) or "not recorded"),
    ]
    methods = {str(row.details["interval"]) for row in run.results if row.details.get("interval")}
    if methods:
        facts.append(("95 % intervals", "; ".join(sorted(methods))))
    names: dict[str, list[str]] = {}
    for details in run.details("run", "versions"):
        for name, version in (details.get("versions") or details).items():
            names.setdefault(str(name), []).append(str(version))
    facts += [(name, listing(list(dict.fromkeys(found)))) for name, found in names.items()]
    if not names:
        facts.append(("versions", "not recorded"))
    rows = [[TableCell(name), TableCell(value)] for name, value in facts]
    blocks: list[Block] = [Table("Origin of the results.", [Column("", words=True), Column("", words=True)], rows)]
    for name, found in (("commit", commits), ("dtype of the models", dtypes)):
        if len(found) > 1:
            blocks.append(Text(f"The results come from more than one {name}.", "note"))
    return PageSection("Seeds, versions and device", blocks)


def recipe_section(run: Run) -> PageSection:
    """The recipe, or the settings of an evaluation, verbatim from the run's folder."""
    if run.evaluation_only:
        return PageSection("Settings", [Folded("Settings of each evaluation, verbatim", [Code(run.recipe_text)])])
    return PageSection("Recipe", [Folded("recipe.toml, verbatim", [Code(run.recipe_text)])])


def _count(run: Run, model: str, arm: str, metric: str) -> int | None:
    estimate = run.find(model, arm, Measure("state", metric, slice_key({})))
    return None if estimate is None else int(estimate.result.value)


def _change(share: float) -> str:
    return f"{100 * share:+.2f} %".replace("-", "−") if share else "0"


def _plain(estimate: Shown | None) -> str:
    return NOT_RUN if estimate is None else format_value(estimate.result.value, estimate.result.unit)


def _whole(count: object) -> str:
    return f"{count:,}" if isinstance(count, int) else NOT_RUN
