"""Which items of a task are run, and their scores from lm-eval's log."""

import logging
import math
import re
from typing import Any

from statex.evaluation.records import Score, digest

logger = logging.getLogger(__name__)

SLICED_METRIC = re.compile(r"(?:(shots)_)?(\d+)(?:_(seen|unseen))?")
SLICED_BY = ("max_length", "shots", "symbols")
"""The columns of RULER's and our tasks with length, number of shots, and whether the symbol asked for is seen."""


def first_of_each(documents: Any, limit: int) -> list[int]:
    """Indices of the first `limit` documents, or of `limit` of each length (or shots and kind), evenly spread.

    The documents of one length are ordered by depth: the first ones would share one depth.
    """
    keys = [name for name in SLICED_BY if name in (getattr(documents, "column_names", None) or [])]
    if not keys:
        return list(range(min(limit, len(documents))))
    places: dict[Any, list[int]] = {}
    for place, value in enumerate(zip(*(documents[key] for key in keys), strict=True)):
        places.setdefault(value, []).append(place)
    return sorted(
        part[number * len(part) // count]
        for part in places.values()
        for count in [min(limit, len(part))]
        for number in range(count)
    )


def scores_of(task: str, samples: list[dict[str, Any]], aggregated: dict[str, Any]) -> list[Score]:
    """Items of lm-eval's log as scores.

    A metric that is named by a length (as RULER's are), or by shots and whether the symbol asked for was among them,
    becomes `accuracy` in that slice; -1 is lm-eval's mark for a length that an item does not have. A perplexity, whose
    items are log-likelihoods, becomes `nll`, in nats, whose mean is the logarithm of the perplexity. Any other metric
    is kept only where lm-eval's own value is the mean of the items, because items are averaged here.

    Args:
        aggregated: lm-eval's values for the whole task, by metric and filter, such as "acc,none".
    """
    kept = _averaged_metrics(task, samples, aggregated)
    scores = []
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter'].replace('-', '_')}"
        where: dict[str, Any] = {}
        values: dict[str, float] = {}
        for name in sample["metrics"]:
            value, key = sample[name], f"{name},{sample['filter']}"
            if not isinstance(value, int | float):
                continue
            if sliced := SLICED_METRIC.fullmatch(name):
                if value != -1:
                    where[sliced[1] or "length"] = int(sliced[2])
                    where |= {"symbols": sliced[3]} if sliced[3] else {}
                    values["accuracy"] = float(value)
            elif key in kept:
                new_name, sign = kept[key]
                values[new_name + suffix] = sign * float(value)
        if values:
            cluster, asked = f"{task}/{sample['doc_id']}", digest(sample["prompt_hash"], sample["target_hash"])
            scores.append(Score(f"{task}{suffix}/{sample['doc_id']}", cluster, where, values, digest=asked))
    return scores


def _averaged_metrics(
    task: str, samples: list[dict[str, Any]], aggregated: dict[str, Any]
) -> dict[str, tuple[str, float]]:
    """Metric and filter -> (its name here, the sign of its items), for those whose items can be averaged."""
    items: dict[str, list[float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            if isinstance(sample[name], int | float) and not SLICED_METRIC.fullmatch(name):
                items.setdefault(f"{name},{sample['filter']}", []).append(float(sample[name]))
    kept: dict[str, tuple[str, float]] = {}
    for key, values in items.items():
        mean, whole = math.fsum(values) / len(values), aggregated.get(key)
        if _close(whole, mean):
            kept[key] = key.partition(",")[0], 1.0
        elif abs(mean) < 700 and _close(whole, math.exp(-mean)):
            kept[key] = "nll", -1.0
        else:
            logger.warning("%s: %s is left out, as it is not the mean of its items", task, key.partition(",")[0])
    return kept


def _close(one: Any, other: float) -> bool:
    return isinstance(one, int | float) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
