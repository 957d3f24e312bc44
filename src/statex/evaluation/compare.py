"""Arms against each other, item by item: paired differences per seed and over seeds, and plain values over seeds."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from statex.errors import UserError
from statex.evaluation.records import Score, digest_of, group, read_scores
from statex.evaluation.suite import Suite
from statex.evaluation.suites import find_suite
from statex.evaluation.summary import generic_suite, length_note, result_of, sums
from statex.results import Result
from statex.results.record import SETTINGS_FILES
from statex.results.statistics import Estimate, Sums, bootstrap_ratio, detectable, needs, over_seeds
from statex.results.suites import SUITES

ITEM_METRICS = {"hit_share"}
"""Metrics of the items themselves, the same for every model."""

Runs = dict[tuple[str, int], list[Score]]
"""(arm, seed) -> scores of one suite, or of one cell of it."""


def compare_arms(
    folders: Mapping[tuple[str, int], Path], baseline: str = "lpt", *, model: str = "", **identity: Any
) -> list[Result]:
    """Compare the arms of one model that were evaluated on the same items.

    For each suite, metric and slice: the paired difference of each arm to the baseline, for each seed and over all
    seeds that both have (`seed` None, `baseline` set), and each arm's value over its seeds (`seed` None, only where
    an arm has several). `details` of a difference has its `power`: the smallest difference that such a comparison
    would establish in 4 of 5 runs (`detectable`), and the number of `items`, or of `seeds`, that would establish one of
    the observed size (None: as many as now; both None: no difference was observed).

    Args:
        folders: (arm, seed) -> the folder `evaluate` wrote, with `items/`.
        baseline: the arm that is subtracted; without it in `folders` there are only plain values.
        model, identity: fields of every Result (model, device, commit).

    Raises:
        UserError: a folder has no items, or two have different ones.
    """
    for key, folder in folders.items():
        if not (Path(folder) / "items").is_dir():
            raise UserError("folders", str(folder), f"has no items of {key}", "evaluate it first")
    training_lengths = {_training_length(Path(folder)) for folder in folders.values()}
    training_length = training_lengths.pop() if len(training_lengths) == 1 else None
    results = []
    for name in _suite_names(folders.values()):
        paths = {key: Path(folder) / "items" / f"{name}.jsonl" for key, folder in folders.items()}
        runs = {key: read_scores(path) for key, path in paths.items() if path.exists()}
        ours = name in SUITES
        suite = find_suite(name) if ours else generic_suite(name, [one for scores in runs.values() for one in scores])
        if not suite.paired:
            continue
        require_same_items(suite.name, runs)
        if suite.name == "ar_hits":
            results += _recall_shares(runs, baseline, {"model": model} | identity)
        for cell in _cells(suite, runs):
            results += _compare_cell(suite, *cell, baseline, training_length, {"model": model} | identity)
    return results


def _suite_names(folders: Iterable[Path]) -> list[str]:
    """The suites of which any folder has items, ours in their order, then lm-eval's tasks."""
    found = {path.stem for folder in folders for path in (Path(folder) / "items").glob("*.jsonl")}
    return [*(name for name in SUITES if name in found), *sorted(found - set(SUITES))]


def require_same_items(suite: str, runs: Runs) -> None:
    """Raise UserError unless all runs were given exactly the same items."""
    hashes = {key: digest_of(scores) for key, scores in runs.items()}
    if len(set(hashes.values())) > 1:
        first = next(iter(hashes))
        other = next(key for key, value in hashes.items() if value != hashes[first])
        raise UserError(
            f"items of {suite}",
            f"{other[0]}, seed {other[1]}",
            f"are not those of {first[0]}, seed {first[1]}",
            "evaluate all arms with the same settings, tokenizer and text",
        )


def _cells(suite: Suite, runs: Runs) -> list[tuple[dict[str, Any], Runs]]:
    """(slice, scores of each run in it) for every group of the suite."""
    cells = []
    for keys in suite.groups:
        parts = {key: group(scores, keys) for key, scores in runs.items()}
        for values in next(iter(parts.values()), {}):
            where = dict(zip(keys, values, strict=True))
            cells.append((where, {key: part[values] for key, part in parts.items()}))
    return cells


def _compare_cell(
    suite: Suite,
    where: dict[str, Any],
    runs: Runs,
    baseline: str,
    training_length: int | None,
    identity: dict[str, Any],
) -> list[Result]:
    results = []
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    note = length_note(where, training_length)
    for metric, unit in suite.units.items():
        measured = {key: sums(scores, metric)[1] for key, scores in runs.items()}
        measured = {key: value for key, value in measured.items() if value.weights.sum() > 0}
        for arm in arms:
            seeds = [seed for name, seed in measured if name == arm]
            if len(seeds) > 1:
                mean = over_seeds([measured[arm, seed] for seed in seeds], fraction=unit == "fraction")
                mean = clip_interval(mean, unit, 0.0)
                results.append(
                    result_of(suite.name, metric, unit, where, mean, note=note, arm=arm, seed=None, **identity)
                )
            if arm != baseline and metric not in ITEM_METRICS:
                for seed, difference, details in _differences(measured, arm, baseline, unit):
                    results.append(
                        result_of(
                            suite.name, metric, unit, where, difference, note=note, details=details,
                            arm=arm, seed=seed, baseline=baseline, **identity,
                        )
                    )  # fmt: skip
    return results


def _differences(
    measured: dict[tuple[str, int], Sums], arm: str, baseline: str, unit: str
) -> list[tuple[int | None, Estimate, dict[str, Any]]]:
    """(seed or None for all together, difference, details) of one arm to the baseline."""
    seeds = [seed for name, seed in measured if name == arm and (baseline, seed) in measured]
    if not seeds:
        return []
    rows: list[tuple[int | None, Estimate, dict[str, Any]]] = []
    for seed, some in [*((seed, [seed]) for seed in seeds), (None, seeds)]:
        ours, theirs = ([measured[name, one] for one in some] for name in (arm, baseline))
        difference = over_seeds(ours, theirs, fraction=unit == "fraction")
        rows.append((seed, clip_interval(difference, unit, -1.0), {"power": _power(difference), "seeds": some}))
    return rows


def _power(difference: Estimate) -> dict[str, float | int | None]:
    """The difference that such a comparison can establish, and what would establish the observed one."""
    needed, smallest = needs(difference), detectable(difference)
    return {
        "detectable": smallest if math.isfinite(smallest) else None,
        "items": needed.items if needed else None,
        "seeds": needed.seeds if needed else None,
    }


def clip_interval(estimate: Estimate, unit: str, lowest: float) -> Estimate:
    """The interval of a fraction, clipped to values that a fraction (or, from -1, a difference of two) can have.

    With few seeds Student's interval exceeds them; the clipped interval covers just as much.
    """
    if unit != "fraction":
        return estimate
    return replace(estimate, low=max(estimate.low, lowest), high=min(estimate.high, 1.0))


def _recall_shares(runs: Runs, baseline: str, identity: dict[str, Any]) -> list[Result]:
    """`recall_share`: the share of an arm's gain or loss in text NLL that falls on AR-hits (Zoology, section 3).

    Only where the NLL differs (its interval excludes 0); all seeds together, items as the source of variance.
    """
    results = []
    for arm in dict.fromkeys(arm for arm, _ in runs if arm != baseline):
        seeds = [seed for name, seed in runs if name == arm and (baseline, seed) in runs]
        if not seeds:
            continue
        whole, hits = (
            [_nll_changes(runs[arm, seed], runs[baseline, seed], metric) for seed in seeds]
            for metric in ("nll", "hit_nll")
        )
        gap = over_seeds(whole)
        if gap.low <= 0 <= gap.high or not gap.low <= gap.high:
            continue
        share = bootstrap_ratio(_total(hits), _total(whole))
        details = {"seeds": seeds, "nll_difference": gap.value}
        results.append(
            result_of("ar_hits", "recall_share", "fraction", {}, share, details=details, arm=arm, seed=None,
                      baseline=baseline, **identity)
        )  # fmt: skip
    return results


def _nll_changes(ours: list[Score], theirs: list[Score], metric: str) -> Sums:
    """Summed change of NLL in each document, and its tokens; documents without such tokens have 0 of both."""
    places = {document: place for place, document in enumerate(sorted({score.cluster for score in ours}))}
    totals, weights = np.zeros(len(places)), np.zeros(len(places))
    for sign, scores in ((1, ours), (-1, theirs)):
        for score in scores:
            weight = score.weights.get(metric, 0.0)
            totals[places[score.cluster]] += sign * weight * score.scores.get(metric, 0.0)
            weights[places[score.cluster]] += weight / 2
    return Sums(totals, weights)


def _total(parts: list[Sums]) -> Sums:
    return Sums(np.sum([part.totals for part in parts], axis=0), np.sum([part.weights for part in parts], axis=0))


def _training_length(folder: Path) -> int | None:
    path = folder / SETTINGS_FILES[0]
    return json.loads(path.read_text(encoding="utf-8")).get("training_length") if path.exists() else None
