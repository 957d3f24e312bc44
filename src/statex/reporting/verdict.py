"""The verdict: what a run has shown, decided from paired differences by fixed rules and stated in plain sentences.

An aim has three outcomes, judged by the 95 % interval of a paired difference. Recall of an expanded arm above that of
post-training alone: met where the interval is above 0, not met where it is below `RECALL_MARGIN`. Recall of the control
not above it: met where the interval is below `RECALL_MARGIN`, not met where it is above 0. Text NLL of at least one
expanded arm at most `TEXT_MARGIN` above: met where its interval is below that, not met where those of all arms are
above. All else is undecided.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from statex.reporting.run import Measure, Run, Shown
from statex.reporting.wording import (
    NOT_RUN,
    format_difference,
    format_needs,
    format_percent_difference,
    format_value,
    listing,
)
from statex.results.claims import RECALL_MARGIN, TEXT_MARGIN, claim

PLATEAU_ACCURACY = 0.9
REFERENCES = ("base", "lpt")
"""The kinds of arms that others are compared with; a model that has no others has no aims."""

Outcome = Literal["met", "not met", "undecided", "not run"]


@dataclass(frozen=True)
class Aim:
    """One aim for one arm: the target, the measured value, the outcome, and what would decide it."""

    aim: str
    arm: str
    measured: str
    outcome: Outcome
    needed: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model: one sentence, the aims behind it, and reservations."""

    model: str
    sentence: str
    aims: list[Aim]
    reservations: list[str]


def verdict(run: Run, model: str) -> Verdict:
    """Judge one model of a run by the rules above."""
    baseline, arms = run.baseline(model), run.arms(model)
    if arms and all(run.kind(arm) in REFERENCES for arm in arms):
        sentence = f"**{model}**: only reference arms were run ({listing(arms)}): no state was expanded."
        return Verdict(model, sentence, [], [remark for remark in [_plateau(run, model)] if remark])
    if baseline is None:
        sentence = f"**{model}**: no arm was post-trained without expansion, so there is nothing to compare with."
        return Verdict(model, sentence, [], [])
    clauses = _recall_clauses(run, model, baseline)
    aims = _recall_aims(run, model, baseline)
    text = {arm: relative_text_nll(run, model, arm) for arm in run.arms_of_kind(model, "statex")}
    if text:
        clauses.append(_text_clause(text))
        aims.append(_text_aim(baseline, text))
    sentence = f"**{model}**: " + "; ".join(clauses) + "."
    reservations = [remark for remark in (_failures(run, model), _plateau(run, model)) if remark]
    return Verdict(model, sentence, aims, reservations)


def unfinished_sentences(run: Run) -> list[str]:
    """What a run lacks, one sentence for each model after the first; none where it is finished."""
    missing = run.unfinished
    if not missing:
        return []
    total = len(run.recipe.seeds) * sum(len(run.recipe.arms_of(model)) for model in run.recipe.models)
    sentences = [
        f"**This run is not finished**: {len(missing)} of {total} arms and seeds are missing or not whole, and what "
        "follows is about the others. `statex run RECIPE` resumes it."
    ]
    for model in dict.fromkeys(one.model for one in missing):
        parts = []
        for lacks in dict.fromkeys(one.lacks for one in missing if one.model == model):
            seeds: dict[str, list[str]] = {}
            for one in missing:
                if (one.model, one.lacks) == (model, lacks):
                    seeds.setdefault(one.arm, []).append(str(one.seed))
            arms = [f"{arm} (seed{'s' * (len(some) > 1)} {listing(some)})" for arm, some in seeds.items()]
            parts.append(f"not {lacks}: {', '.join(arms)}")
        sentences.append(f"{model}: {'; '.join(parts)}.")
    return sentences


def hardest_recall(run: Run, model: str) -> Measure | None:
    """The recall measure with the most pairs (and the longest sequence), None if recall was not run."""
    return max(
        run.measures(model, "mqar", "accuracy"),
        key=lambda measure: (measure.values.get("num_pairs", 0), measure.values.get("length", 0)),
        default=None,
    )


def text_measure(run: Run, model: str) -> Measure | None:
    """The NLL that stands for text quality: over the AR-hits documents, else over all positions."""
    for suite in ("ar_hits", "nll_by_position"):
        measure = Measure(suite, "nll")
        if any(run.find(model, arm, measure) for arm in run.arms(model)):
            return measure
    return None


def relative_text_nll(run: Run, model: str, arm: str) -> Shown | None:
    """How much an arm's text NLL is above the baseline's, as a share of the baseline's; None if not run."""
    measure, baseline = text_measure(run, model), run.baseline(model)
    if measure is None or baseline is None:
        return None
    reference = run.find(model, baseline, measure)
    difference = run.find(model, arm, replace(measure, baseline=baseline))
    if reference is None or difference is None or not reference.result.value > 0:
        return None
    return difference.scaled(100 / reference.result.value, "%")


def signatures(run: Run, model: str) -> list[tuple[str, Measure, str]]:
    """(arm, measure, sentence) of each sign of failure that the run's diagnosis found, by the present rules."""
    found = []
    for measure in run.measures(model, "diagnostics", paired=True):
        for arm in run.arms(model):
            sign = run.find(model, arm, measure)
            undecided = sign and measure.metric == "recall_flat" and claim(sign.interval) in ("gain", "undecided")
            if sign and not undecided:
                found.append((arm, measure, sign.result.note))
    return found


def above_zero(difference: Shown | None) -> bool | None:
    """True where the interval lies above 0, False where below, None where neither is established."""
    if difference is None or difference.interval is None:
        return None
    low, high = difference.interval
    return True if low > 0 else False if high < 0 else None


def recall_difference(run: Run, model: str, arm: str) -> Shown | None:
    """An arm's recall at the most pairs minus the baseline's."""
    recall = hardest_recall(run, model)
    return None if recall is None else run.find(model, arm, replace(recall, baseline=run.baseline(model)))


def recall_outcome(kind: str, difference: Shown | None) -> Outcome:
    """Whether an expanded arm gained recall, or, for the kind "control", whether it did not."""
    if difference is None:
        return "not run"
    claimed = claim(difference.interval)
    if claimed == "undecided":
        return "undecided"
    return "met" if (claimed == "gain") == (kind == "statex") else "not met"


def text_outcome(relative: Shown | None) -> Outcome:
    """Whether an arm kept text NLL within `TEXT_MARGIN`."""
    if relative is None:
        return "not run"
    low, high = relative.interval or (-math.inf, math.inf)
    if math.isnan(relative.result.value) or low > 100 * TEXT_MARGIN:
        return "not met"
    return "met" if high <= 100 * TEXT_MARGIN else "undecided"


def _recall_clauses(run: Run, model: str, baseline: str) -> list[str]:
    recall = hardest_recall(run, model)
    if recall is None:
        return ["recall was not run"]
    groups: dict[str, list[str]] = {name: [] for name in ("gain", "undecided", "no gain", "loss", "not run")}
    for arm in run.arms_of_kind(model, "statex"):
        difference = recall_difference(run, model, arm)
        group: str = "not run" if difference is None else claim(difference.interval)
        groups[group].append(arm if difference is None else _with_arm(difference, arm))
    subject, what = "expanding the state", f"recall at {recall.values.get('num_pairs')} pairs"
    first = {
        "gain": f"{subject} raised {what} over post-training alone ({baseline}) by ",
        "undecided": f"whether {subject} raised {what} over post-training alone ({baseline}) is undecided: ",
        "no gain": f"{subject} did not raise {what} by {RECALL_MARGIN:g} or more: ",
        "loss": f"{subject} **lowered** {what} by ",
    }
    later = {
        "undecided": "undecided for ",
        "no gain": f"no gain of {RECALL_MARGIN:g} or more for ",
        "loss": "recall **fell** by ",
    }
    clauses: list[str] = []
    for group in first:
        if groups[group]:
            clauses.append((later if clauses else first)[group] + listing(groups[group]))
    if groups["not run"]:
        clauses.append(f"not run: {listing(groups['not run'])}")
    return [*(clauses or ["no expanded arm was run"]), _control_clause(run, model)]


def _control_clause(run: Run, model: str) -> str:
    controls = {arm: recall_difference(run, model, arm) for arm in run.arms_of_kind(model, "control")}
    measured = {arm: difference for arm, difference in controls.items() if difference is not None}
    if not measured:
        return "no control was run, so a change cannot be attributed to the state"
    alone = len(measured) == 1
    shown = listing([format_difference(one) if alone else _with_arm(one, arm) for arm, one in measured.items()])
    claims = {claim(difference.interval) for difference in measured.values()}
    if "gain" in claims:
        return f"the control **rose too** ({shown}), so a gain is not due to the state alone"
    if "undecided" in claims:
        return f"whether the control rose too is undecided ({shown})"
    return f"the control did not rise ({shown})"


def _recall_aims(run: Run, model: str, baseline: str) -> list[Aim]:
    wanted = {"statex": f"recall above {baseline}", "control": f"control not above {baseline}"}
    aims = []
    for kind, aim in wanted.items():
        for arm in run.arms_of_kind(model, kind):
            difference = recall_difference(run, model, arm)
            outcome = recall_outcome(kind, difference)
            needed = format_needs(difference.result) if difference and outcome == "undecided" else ""
            aims.append(Aim(aim, arm, format_difference(difference), outcome, needed))
    return aims


def _text_clause(text: dict[str, Shown | None]) -> str:
    measured = {arm: relative for arm, relative in text.items() if relative is not None}
    if not measured:
        return "text NLL was not run"
    parts = []
    for arm, relative in measured.items():
        if not math.isfinite(relative.result.value):
            parts.append(f"not a number ({arm})")
            continue
        word = {True: " worse", False: " better", None: ""}[above_zero(relative)]
        open_end = "" if word else ", no difference established"
        parts.append(f"{format_percent_difference(relative)}{word} ({arm}{open_end})")
    missing = [arm for arm in text if arm not in measured]
    return f"text NLL is {listing(parts)}" + (f", not run for {listing(missing)}" if missing else "")


def _text_aim(baseline: str, text: dict[str, Shown | None]) -> Aim:
    """One arm is enough: the aim is met if any arm meets it, not met if none does, else undecided."""
    aim = f"text NLL within {100 * TEXT_MARGIN:.0f} % of {baseline} (one arm is enough)"
    measured = {arm: relative for arm, relative in text.items() if relative is not None}
    if not measured:
        return Aim(aim, "–", NOT_RUN, "not run")
    outcomes = {arm: text_outcome(relative) for arm, relative in measured.items()}
    best: tuple[Outcome, ...] = ("met", "undecided", "not met")
    outcome = next(one for one in best if one in outcomes.values())
    upper_ends = {arm: one.interval[1] if one.interval else math.inf for arm, one in measured.items()}
    arm = min((arm for arm in measured if outcomes[arm] == outcome), key=upper_ends.__getitem__)
    return Aim(aim, arm, format_percent_difference(measured[arm]), outcome)


def _plateau(run: Run, model: str) -> str | None:
    """Without recall at the fewest pairs the arms compare optimisation, not memory."""
    measures = run.measures(model, "mqar", "accuracy")
    arm = next(iter(run.arms_of_kind(model, "base")), run.baseline(model))
    if not measures or arm is None:
        return None
    easiest = min(measures, key=lambda measure: measure.values.get("num_pairs", 0))
    estimate = run.find(model, arm, easiest)
    if estimate is None or estimate.result.value >= PLATEAU_ACCURACY:
        return None
    return (
        f"{arm} reaches only {format_value(estimate.result.value)} at {easiest.values.get('num_pairs')} pairs "
        f"(n = {estimate.result.n}): where recall is not learnt even at the fewest pairs, arms differ in optimisation "
        "as much as in memory."
    )


def _failures(run: Run, model: str) -> str | None:
    """The signs of failure that the diagnosis found, with their arms."""
    arms: dict[str, list[str]] = {}
    for arm, measure, _ in signatures(run, model):
        arms.setdefault(measure.metric.replace("_", " "), []).append(arm)
    if not arms:
        return None
    signs = [f"{metric} ({listing(list(dict.fromkeys(names)))})" for metric, names in arms.items()]
    return f"signs of failure: {listing(signs)}; see the [Diagnosis](#Diagnosis)."


def _with_arm(difference: Shown, arm: str) -> str:
    """A difference with its arm: "+0.27 [+0.22, +0.31] (reinit)"."""
    return f"{format_difference(difference)} ({arm})"
