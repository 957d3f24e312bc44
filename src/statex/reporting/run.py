"""A run as the report sees it: its recipe and, for each measure of an arm, the one row that is shown."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.recipe import Recipe, load_recipe, parse_recipe
from statex.results import Result, read_results
from statex.results.record import NOT_RUN_FILE, SETTINGS_FILES, Unfinished, unfinished_arms_of
from statex.results.suites import split_names


@dataclass(frozen=True)
class Shown:
    """A measured value as the report shows it.

    Args:
        result: the row that combines the seeds if there is one, else the single seed's. For several seeds that were
            not combined, its value is their mean and it has no interval.
        seeds: the training seeds behind it.
        spread: the lowest and highest seed, only where several seeds were not combined.
    """

    result: Result
    seeds: tuple[int, ...] = ()
    spread: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, None where there is none or where it is not a number."""
        low, high = self.result.low, self.result.high
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return None
        return low, high

    def scaled(self, factor: float, unit: str | None = None) -> "Shown":
        """The value times a factor, by default in the same unit; a negative factor swaps the ends of its interval."""

        def times(ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = (None if end is None else end * factor for end in ends)
            return (low, high) if factor > 0 else (high, low)

        row, (low, high) = self.result, times((self.result.low, self.result.high))
        row = replace(row, value=row.value * factor, low=low, high=high, unit=row.unit if unit is None else unit)
        return Shown(row, self.seeds, self.spread and times(self.spread))


@dataclass(frozen=True)
class Measure:
    """What was measured, the same for all arms: suite, metric, slice, and the arm that was subtracted."""

    suite: str
    metric: str
    slice: str = "{}"
    baseline: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The slice as a dictionary."""
        return json.loads(self.slice)


def slice_key(values: dict[str, Any]) -> str:
    """A slice as a string that is equal for equal slices."""
    return json.dumps(values, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """A run's folder, read: the recipe (also verbatim) and all results.

    Models that were only evaluated, by `statex eval`, appear as arms, and `recipe_text` has the settings.
    """

    recipe: Recipe
    recipe_text: str
    results: list[Result]
    evaluation_only: bool = False

    @property
    def models(self) -> list[str]:
        """The recipe's models, then any other that has results."""
        return _ordered(self.recipe.models, (result.model for result in self.results))

    def arms(self, model: str) -> list[str]:
        """The recipe's arms of a model, then any other that has results."""
        measured = (result.arm for result in self.results if result.model == model and result.suite != "cost")
        return _ordered(self.recipe.arms_of(model), measured)

    def arms_of_kind(self, model: str, kind: str) -> list[str]:
        """The arms of a model whose kind is "base", "lpt", "statex" or "control"."""
        return [arm for arm in self.arms(model) if self.kind(arm) == kind]

    def kind(self, arm: str) -> str:
        """The kind of an arm, "" for one that the recipe does not know, and where nothing was trained."""
        return self.recipe.arms[arm].kind if arm in self.recipe.arms and not self.evaluation_only else ""

    def rank(self, model: str, arm: str) -> int:
        """An arm's place among the expanded arms of its model (and those without a kind), else 0."""
        drawn_by_rank = [one for one in self.arms(model) if self.kind(one) in ("statex", "")]
        return drawn_by_rank.index(arm) if arm in drawn_by_rank else 0

    def baseline(self, model: str) -> str | None:
        """The arm that the others are compared with: the first that was post-trained without expansion."""
        return next(iter(self.arms_of_kind(model, "lpt")), None)

    def find(self, model: str, arm: str, measure: Measure) -> Shown | None:
        """The value of a measure for an arm, None if it was not run."""
        return self._shown.get((model, arm, measure))

    @property
    def unfinished(self) -> list[Unfinished]:
        """The arms and seeds that the run lacks; none where it is finished."""
        return unfinished_arms_of(self.results)

    @property
    def asked(self) -> list[str]:
        """Our suites that the recipe asks for, whether they have results or not; with groups expanded."""
        return split_names(self.recipe.evaluation.suites)[0]

    def measures(self, model: str, suite: str, metric: str | None = None, paired: bool = False) -> list[Measure]:
        """The measures of a suite, in order of slices: plain values or, if `paired`, differences of arms."""
        found: dict[Measure, None] = {}
        for name, _, measure in self._shown:
            wanted = measure.suite == suite and metric in (None, measure.metric)
            if name == model and wanted and (measure.baseline is not None) == paired:
                found[measure] = None
        metrics = list(dict.fromkeys(measure.metric for measure in found))
        return sorted(found, key=lambda measure: (metrics.index(measure.metric), _slice_order(measure.values)))

    def suites(self, model: str) -> list[str]:
        """The suites that have results, in the order they were written."""
        return list(dict.fromkeys(measure.suite for name, _, measure in self._shown if name == model))

    def details(self, suite: str, metric: str) -> list[dict[str, Any]]:
        """The details of all results of a metric, without repetitions."""
        found = {
            slice_key(row.details): row.details for row in self.results if (row.suite, row.metric) == (suite, metric)
        }
        return list(found.values())

    @cached_property
    def _shown(self) -> dict[tuple[str, str, Measure], Shown]:
        groups: dict[tuple[str, str, Measure], list[Result]] = defaultdict(list)
        for row in self.results:
            measure = Measure(row.suite, row.metric, slice_key(row.slice), row.baseline)
            groups[row.model, row.arm, measure].append(row)
        seeds = [] if self.evaluation_only else self.recipe.seeds
        return {key: _estimate(rows, seeds) for key, rows in groups.items() if key[2].suite != "run"}


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: the folder has no recipe.toml or no results.jsonl.
    """
    folder = Path(folder)
    for name, remedy in (("recipe.toml", "give the folder of a run"), ("results.jsonl", "evaluate the run first")):
        if not (folder / name).is_file():
            raise UserError("run", str(folder), f"has no {name}", remedy)
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    return Run(load_recipe(folder / "recipe.toml"), text, read_results(folder / "results.jsonl"))


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is what `statex eval` made."""
    return not (folder / "recipe.toml").is_file() and any((folder / name).is_file() for name in SETTINGS_FILES)


def read_evaluations(folders: Sequence[Path]) -> Run:
    """Read the folders of evaluated models as one run, with the folders' names as arms.

    Raises:
        UserError: one of the folders has no results.jsonl, or two have the same name.
    """
    names = [re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "", folder.resolve().name) or "model" for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(
            "run", ", ".join(names), "has a name twice", "evaluate with --out into folders with different names"
        )
    model = names[0] if len(names) == 1 else "models"
    results, missing, settings = [], [], []
    for name, folder in zip(names, folders):
        if not (folder / "results.jsonl").is_file():
            raise UserError("run", str(folder), "has no results.jsonl", "let the evaluation finish")
        results += [replace(row, model=model, arm=name) for row in read_results(folder / "results.jsonl")]
        if (folder / NOT_RUN_FILE).is_file():
            missing += json.loads((folder / NOT_RUN_FILE).read_text(encoding="utf-8"))
        paths = [folder / one for one in SETTINGS_FILES if (folder / one).is_file()]
        settings += [f"{path}\n{path.read_text(encoding='utf-8')}" for path in paths]
    first = folders[0] / SETTINGS_FILES[0]
    evaluation = json.loads(first.read_text(encoding="utf-8"))["evaluation"] if first.is_file() else {}
    values = {
        "name": model,
        "models": {model: {"checkpoint": str(folders[0])}},
        "arms": {name: {"kind": "base"} for name in names},
        "evaluation": evaluation | {"suites": sorted({row.suite for row in results})},
    }
    if missing:
        results.append(Result("run", "not_run", len(missing), "tasks", model=model, details={"tasks": missing}))
    return Run(parse_recipe(values), "\n".join(settings), results, evaluation_only=True)


def _estimate(rows: list[Result], recipe_seeds: list[int]) -> Shown:
    seeds = tuple(sorted({row.seed for row in rows if row.seed is not None}))
    combined = [row for row in rows if row.seed is None]
    if combined:
        return Shown(combined[-1], seeds or tuple(sorted(combined[-1].details.get("seeds", recipe_seeds))))
    latest = list({row.seed: row for row in rows}.values())
    if len(latest) == 1:
        return Shown(latest[0], seeds)
    values = [row.value for row in latest]
    if len(set(values)) == 1:  # a count, equal for all seeds
        return Shown(latest[0], seeds)
    mean = replace(latest[0], value=sum(values) / len(values), low=None, high=None, seed=None)
    return Shown(mean, seeds, (min(values), max(values)))


def _ordered(first: Iterable[str], others: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *(name for name in others if name)]))


def _slice_order(values: dict[str, Any]) -> tuple:
    """Numbers by size, words alphabetically, slices with fewer keys first, and lengths before everything else."""
    keys = sorted(values, key=lambda key: (key != "length", key))
    numeric = {key: isinstance(values[key], int | float) for key in keys}
    return len(values), [(key, not numeric[key], values[key] if numeric[key] else str(values[key])) for key in keys]
