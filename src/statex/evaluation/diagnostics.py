"""Whether an expanded model uses its new state and its new parameters; and the signs of a failed expansion."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from statex.data.recall import mqar_batch
from statex.evaluation.compare import clip_interval
from statex.evaluation.context import Context, Request
from statex.evaluation.reader import Reader, State
from statex.evaluation.records import Score
from statex.evaluation.suites.mqar import TOKENS_PER_PAIR, vocabulary
from statex.evaluation.summary import estimate_mean, result_of
from statex.evaluation.text.windows import held_out_windows
from statex.expansion.edits import LayerChange, StoredPlan
from statex.expansion.state_use import effective_rank, layer_state, new_entries, new_state_energy
from statex.expansion.stored import stored_plan
from statex.models.dispatch import statex_ops
from statex.results import Result
from statex.results.claims import RECALL_MARGIN, claim
from statex.results.statistics import NORMAL_QUANTILE, Estimate, Sums, bootstrap_difference, combine
from statex.results.suites import HARNESS_GROUPS, split_names

SUITE_NAME = "diagnostics"
NUM_SEQUENCES = 64
"""MQAR sequences for measuring recall without the new state."""
NUM_WINDOWS = 32
"""Windows of text; computing a state's singular values takes far longer than reading the text."""


def diagnose(
    model: torch.nn.Module, tokenizer: Any, request: Request, start: Mapping[str, torch.Tensor] | None = None
) -> list[Result]:
    """How much of its new state a model uses, and how much its fresh tensors have changed.

    With `start`, for each layer: `weight_change`, the norm of the change of its fresh tensors over the norm of the
    tensors themselves. Where `nll_by_position` is among the suites, after half a window of held-out text, for each
    expanded layer: `new_state_energy`, the new entries' share of the squared state (`details` has their share of the
    entries), `effective_rank` (exp of the entropy of the singular values, Roy and Vetterli 2007) and
    `effective_rank_without_new_state`; and for the model `nll_rise_without_new_state`, in nats over the other half,
    when the new entries are zeroed between the halves. Where `mqar` is among them: `recall_drop_without_new_state`,
    when they are zeroed between a sequence's pairs and its queries.

    Args:
        model: with a plan in its configuration; without one there are no results.
        start: the state_dict of the model right after the expansion.
    """
    plan = stored_plan(cast(Any, model.config))
    if plan is None:
        return []
    reader = Reader(model)
    with statex_ops():
        context = request.context(reader, tokenizer)
    facts = request.facts(reader)
    results = weight_changes(plan, model.state_dict(), start, facts) if start is not None else []
    if plan.kind != "expand":
        return results
    suites, _ = split_names(request.evaluation.suites)
    with statex_ops():
        if "nll_by_position" in suites:
            results += _on_text(context, plan, facts)
        if "mqar" in suites:
            results += _on_recall(context, plan, facts)
    return results


def without_new_state(reader: Reader, state: State, plan: StoredPlan) -> State:
    """A copy of a state whose new entries are 0."""
    copied = reader.copy_state(state)
    for layer in plan.layers:
        view = layer_state(copied.cache, layer, plan.model_type)
        view.masked_fill_(new_entries(layer).to(view.device), 0)
    return copied


@torch.inference_mode()
def _on_text(context: Context, plan: StoredPlan, facts: dict[str, Any]) -> list[Result]:
    """Energy and rank in the middle of held-out windows, and the loss in the second half without the new state."""
    reader, scores, size = context.reader, [], context.evaluation.batch_size
    windows = held_out_windows(context, "nll_by_position", context.settings("nll_by_position"), context.training_length)
    windows = windows[:NUM_WINDOWS]
    ids = torch.from_numpy(np.stack([window.ids for window in windows]))
    half = ids.shape[1] // 2
    for start in range(0, len(ids), size):
        rows = ids[start : start + size]
        _, state = reader.read(rows[:, :half].tolist())
        measured = {layer.index: _state_use(state, layer, plan.model_type) for layer in plan.layers}
        zeroed = without_new_state(reader, state, plan)
        targets = rows[:, half + 1 :]
        rise = reader.score(rows[:, half:-1], targets, zeroed)[0] - reader.score(rows[:, half:-1], targets, state)[0]
        for row, window in enumerate(windows[start : start + size]):
            for layer in plan.layers:
                values = {name: float(found[row]) for name, found in measured[layer.index].items()}
                item = f"{window.name}/{layer.index}"
                scores.append(Score(item, window.document, {"layer": layer.index}, values))
            scores.append(
                Score(window.name, window.document, {}, {"nll_rise_without_new_state": float(rise[row].mean())})
            )
    results = []
    for layer in plan.layers:
        mine = [score for score in scores if score.slice.get("layer") == layer.index]
        share = float(new_entries(layer).float().mean())
        most = min(layer.after.key_dim, layer.after.value_dim)
        where = {"layer": layer.index}
        results += _results(mine, "new_state_energy", "fraction", where, facts, share_of_entries=share)
        for metric in ("effective_rank", "effective_rank_without_new_state"):
            results += _results(mine, metric, "", where, facts, largest_possible=most)
    whole = [score for score in scores if not score.slice]
    return results + _results(whole, "nll_rise_without_new_state", "nats", {}, facts)


def _state_use(state: State, layer: LayerChange, model_type: str) -> dict[str, torch.Tensor]:
    """(B,) for each measure of one layer's state."""
    view = layer_state(state.cache, layer, model_type)
    return {
        "new_state_energy": new_state_energy(view, layer).cpu(),
        "effective_rank": effective_rank(view),
        "effective_rank_without_new_state": effective_rank(view.masked_fill(new_entries(layer).to(view.device), 0)),
    }


@torch.inference_mode()
def _on_recall(context: Context, plan: StoredPlan, facts: dict[str, Any]) -> list[Result]:
    """The loss of MQAR when the new entries are zeroed between the pairs and the queries."""
    settings, reader = context.settings("mqar"), context.reader
    num_pairs = max(settings.num_pairs)
    length, middle = TOKENS_PER_PAIR * num_pairs, 2 * num_pairs
    count = min(settings.num_items, NUM_SEQUENCES)
    ids, labels = mqar_batch([context.evaluation.seed, num_pairs], count, length, num_pairs, *vocabulary(context))
    right: dict[str, list[float]] = {"whole": [], "zeroed": []}
    for start in range(0, count, context.evaluation.batch_size):
        rows = ids[start : start + context.evaluation.batch_size]
        targets = labels[start : start + context.evaluation.batch_size, middle + 1 :]
        _, state = reader.read(rows[:, :middle].tolist())
        zeroed = without_new_state(reader, state, plan)
        for name, start_state in (("whole", state), ("zeroed", zeroed)):
            found = reader.score(rows[:, middle:-1], targets, start_state)[1]
            right[name] += found.sum(dim=1).tolist()
    whole, without = (Sums(np.array(found) / num_pairs, np.ones(count)) for found in right.values())
    drop = bootstrap_difference(whole, without, fraction=True)
    where = {"num_pairs": num_pairs, "length": length}
    return [result_of(SUITE_NAME, "recall_drop_without_new_state", "", where, drop, **facts)]


def weight_changes(
    plan: StoredPlan, now: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], facts: dict[str, Any]
) -> list[Result]:
    """One result per layer: how much its fresh tensors changed, all together, and in `details` each of them."""
    results = []
    for layer in plan.layers:
        moved: dict[str, float] = {}
        change = size = 0.0
        for edit in layer.tensors:
            if edit.is_fresh and edit.name in start and edit.name in now:
                before, after = start[edit.name].float().cpu(), now[edit.name].float().cpu()
                delta, norm = float((after - before).norm()), float(after.norm())
                moved[edit.name] = delta / norm if norm else 0.0
                change, size = change + delta**2, size + norm**2
        still = [name for name, value in moved.items() if value == 0]
        note = f"not moved at all: {', '.join(still)}" if still else ""
        value = math.sqrt(change / size) if size else 0.0
        results.append(
            Result(SUITE_NAME, "weight_change", value, slice={"layer": layer.index}, note=note, details=moved, **facts)
        )
    return results


def _results(
    scores: Sequence[Score], metric: str, unit: str, where: dict[str, Any], facts: dict[str, Any], **details: Any
) -> list[Result]:
    estimate = estimate_mean(scores, metric, unit)
    return [result_of(SUITE_NAME, metric, unit, where, estimate, details=details, **facts)] if estimate else []


def combine_seeds(results: Sequence[Result]) -> list[Result]:
    """The values of a diagnosis that have intervals, over all seeds of each arm that has several (`seed` None)."""
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for row in results:
        if row.suite == SUITE_NAME and None not in (row.seed, row.low, row.high):
            groups.setdefault((row.model, row.arm, row.metric, str(row.slice)), []).append(row)
    combined = []
    for rows in groups.values():
        if len(rows) > 1:
            mean = clip_interval(combine([_estimate_of(row) for row in rows]), rows[0].unit, 0.0)
            if (most := rows[0].details.get("largest_possible")) is not None:  # a rank, from 1 on
                mean = replace(mean, low=max(mean.low, 1.0), high=min(mean.high, float(most)))
            facts = {"interval": mean.method, "num_seeds": mean.seeds, "seeds": [row.seed for row in rows]}
            details = rows[0].details | facts
            combined.append(
                replace(rows[0], value=mean.value, low=mean.low, high=mean.high, seed=None, details=details)
            )
    return combined


def _estimate_of(row: Result) -> Estimate:
    low, high = cast(float, row.low), cast(float, row.high)
    error = (high - low) / (2 * NORMAL_QUANTILE)
    return Estimate(row.value, low, high, row.n or 1, str(row.details.get("interval")), error)


def failure_signatures(
    results: Sequence[Result], baseline: str = "lpt", arms: Collection[str] | None = None
) -> list[Result]:
    """The two ways in which an expansion can fail, where the paired differences in `results` show them.

    `text_lost`: text NLL rose (that of AR-hits' documents, else that by position), or common-sense accuracy fell.
    `recall_flat`: recall at the most pairs did not rise by `RECALL_MARGIN`: the whole interval is below it. One that
    reaches from 0 or below to above the margin is undecided, and not a sign. Each is a copy of the difference that
    shows it, with that difference's suite and metric as `of` in its slice (an arm can have several), and a sentence as
    its note.

    Args:
        arms: those that were expanded; default: all but the baseline.
    """
    differences = [row for row in results if row.baseline == baseline and None not in (row.low, row.high)]
    if arms is not None:
        differences = [row for row in differences if row.arm in arms]
    together = {(row.model, row.arm) for row in differences if row.seed is None}
    most = max((row.slice["num_pairs"] for row in differences if row.suite == "mqar"), default=0)
    text = "ar_hits" if any(row.suite == "ar_hits" for row in differences) else "nll_by_position"
    found = []
    for row in differences:
        if row.seed is not None and (row.model, row.arm) in together:
            continue  # the difference over all seeds covers them
        low, high = cast(float, row.low), cast(float, row.high)
        by = f"{row.value:+z.3f} against {baseline} (95 % interval {low:+z.3f} to {high:+z.3f})"
        if (row.suite, row.metric, row.slice) == (text, "nll", {}) and low > 0:
            sentence = (
                f"Text NLL changed by {by}: {TEXT_LOST}; expand fewer layers, train longer, or use init preserve."
            )
            found.append(_signature(row, "text_lost", sentence))
        elif row.suite in COMMON_SENSE and row.metric == "acc" and high < 0:
            found.append(_signature(row, "text_lost", f"Accuracy on {row.suite} changed by {by}: {TEXT_LOST}."))
        elif (row.suite, row.slice.get("num_pairs")) == ("mqar", most) and claim((low, high)) in ("no gain", "loss"):
            sentence = (
                f"Recall at {most} pairs changed by {by}: a gain of {RECALL_MARGIN:g} or more is ruled out, so the "
                "added capacity may be unused; train longer or at a higher learning rate."
            )
            found.append(_signature(row, "recall_flat", sentence))
    return found


COMMON_SENSE = HARNESS_GROUPS["common-sense"]
TEXT_LOST = "too many layers were expanded for this budget, or weights outside the mixers were lost"


def _signature(row: Result, metric: str, sentence: str) -> Result:
    where = row.slice | {"of": f"{row.suite} {row.metric}"}
    return replace(row, suite=SUITE_NAME, metric=metric, slice=where, note=sentence)
