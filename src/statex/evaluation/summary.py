"""From scores of items to results with intervals, by the same rule for every suite."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from statex.evaluation.records import Score, digest_of, group
from statex.evaluation.suite import Suite
from statex.results import Result
from statex.results.statistics import Estimate, Sums, bootstrap_mean, wilson

PAST_TRAINING = "past the training length"


def summarize(
    suite: Suite, scores: Sequence[Score], *, training_length: int | None = None, **identity: Any
) -> list[Result]:
    """One result for each metric and each cell of each of the suite's groups.

    Args:
        identity: further fields of every Result: model, arm, seed, state_bytes, device, commit.
    """
    results = []
    for keys in suite.groups:
        for values, members in group(scores, keys).items():
            where = dict(zip(keys, values, strict=True))
            for metric, unit in suite.units.items():
                estimate = estimate_mean(members, metric, unit)
                if estimate is None:
                    continue
                results.append(
                    result_of(
                        suite.name,
                        metric,
                        unit,
                        where,
                        estimate,
                        note=length_note(where, training_length),
                        details=item_details(members),
                        **identity,
                    )
                )
    return results


def generic_suite(name: str, scores: Sequence[Score]) -> Suite:
    """A suite known only by its scores (lm-eval's tasks): its groups are its slices.

    Metrics are fractions where all their values lie between 0 and 1, and otherwise have no unit; `nll` is in nats.
    """
    units: dict[str, str] = {}
    for metric, value in sorted((metric, value) for score in scores for metric, value in score.scores.items()):
        units[metric] = "fraction" if units.get(metric) != "" and 0 <= value <= 1 else ""
    units |= {metric: "nats" for metric in units if metric.startswith("nll")}
    keys = sorted({key for score in scores for key in score.slice})
    return Suite(
        name=name,
        units=units,
        groups=(tuple(keys),),
        cells=lambda context: [],
        score=lambda context, cell: [],
    )


def estimate_mean(scores: Sequence[Score], metric: str, unit: str) -> Estimate | None:
    """Wilson's interval where each item is right or wrong and its own cluster, else a bootstrap over clusters."""
    clusters, weighted = sums(scores, metric)
    if not clusters or weighted.weights.sum() <= 0:
        return None
    values = [score.scores[metric] for score in scores if metric in score.scores]
    plain = len(clusters) == len(values) and (weighted.weights == 1).all()
    if unit == "fraction" and plain and set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    return bootstrap_mean(weighted, fraction=unit == "fraction")


def sums(scores: Iterable[Score], metric: str) -> tuple[list[str], Sums]:
    """The clusters that have a metric, sorted, and its weighted sums in each."""
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    for score in scores:
        if metric not in score.scores:
            continue
        weight = score.weights.get(metric, 1.0)
        totals[score.cluster] = totals.get(score.cluster, 0.0) + weight * score.scores[metric]
        weights[score.cluster] = weights.get(score.cluster, 0.0) + weight
    clusters = sorted(totals)
    return clusters, Sums(np.array([totals[key] for key in clusters]), np.array([weights[key] for key in clusters]))


def result_of(
    suite: str, metric: str, unit: str, where: dict[str, Any], estimate: Estimate, *, note: str = "",
    details: dict[str, Any] | None = None, **identity: Any,
) -> Result:  # fmt: skip
    """A Result of an estimate; where there is no interval, `low` and `high` are None."""
    exists = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return Result(
        suite=suite,
        metric=metric,
        value=estimate.value,
        unit=unit,
        low=estimate.low if exists else None,
        high=estimate.high if exists else None,
        n=estimate.n,
        slice=where,
        note=note,
        details={"interval": estimate.method, "num_seeds": estimate.seeds} | (details or {}),
        **identity,
    )


def length_note(where: dict[str, Any], training_length: int | None) -> str:
    """A remark where some of a value's tokens lie beyond the training length."""
    end = where.get("to", where.get("length"))
    return PAST_TRAINING if training_length is not None and end is not None and end > training_length else ""


def item_details(scores: Sequence[Score]) -> dict[str, Any]:
    """The hash of the items, and the range of everything measured on them (their lengths in tokens)."""
    details: dict[str, Any] = {"items_hash": digest_of(scores)}
    for name in sorted({name for score in scores for name in score.measured}):
        values = [score.measured[name] for score in scores if name in score.measured]
        same = len(set(map(str, values))) == 1
        details[name] = values[0] if same or not isinstance(values[0], int | float) else [min(values), max(values)]
    return details
