"""One Result record for everything that is measured, kept as JSON lines."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from statex.utils.atomic import write_text_atomic

SETTINGS_FILES = ("evaluation.json", "harness.json")
"""The settings that made the scores in an evaluation's folder: those of our suites, and those of lm-eval's tasks."""
NOT_RUN_FILE = "not_run.json"
"""The tasks of lm-eval whose data was missing, each with the command that fetches it."""


@dataclass(frozen=True)
class Result:
    """One measured value with what is needed to judge it.

    Args:
        suite: what was run, for example "mqar".
        metric: what is counted, for example "accuracy", "nll", "tokens_per_second".
        value: what was measured.
        unit: "fraction", "nats", "bytes", "tokens/s", "ms", "elements", ...
        low, high: the 95 % interval, None where there is none (a count of bytes).
        n: the number of independent items (questions, documents, repetitions) behind it.
        slice: what the value is restricted to, for example {"num_pairs": 32}.
        model: the model's name in the recipe, or its path.
        arm: the arm of the recipe ("lpt", "reinit", ...), or "" outside a recipe.
        seed: the training seed, None outside a recipe and where several seeds are combined.
        baseline: the arm that was subtracted, for a paired difference; None for a plain value.
        state_bytes: recurrent state of the measured model at batch 1, in bytes.
        device: the device's own name.
        dtype: of the measured model's weights, "float32" for example; "" where none was measured.
        commit: commit of the source tree, or the version of the package.
        note: a remark the report prints beside the value, for example "past the training length".
        details: anything else a program may want, for example the hash of the items.
    """

    suite: str
    metric: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    slice: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    arm: str = ""
    seed: int | None = None
    baseline: str | None = None
    state_bytes: int | None = None
    device: str = ""
    dtype: str = ""
    commit: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


UNFINISHED = "unfinished"
"""The metric of suite "run" that says what a run lacks; a finished run has none."""


@dataclass(frozen=True)
class Unfinished:
    """An arm of a model, with one seed, of a run that is not finished.

    Args:
        lacks: what it is not yet: "pre-trained", "trained", "evaluated" or "diagnosed".
    """

    model: str
    arm: str
    seed: int
    lacks: str


def unfinished_arms_of(results: Iterable[Result]) -> list[Unfinished]:
    """What the run of these results lacks."""
    rows = [row for row in results if (row.suite, row.metric) == ("run", UNFINISHED)]
    return [Unfinished(**one) for row in rows for one in row.details["arms"]]


Record = TypeVar("Record")


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write instances of a dataclass to `path` as JSON lines, atomically."""
    write_text_atomic(path, "".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read the instances of a dataclass in `path`; keys of a newer version are ignored."""
    known = {item.name for item in fields(cast(Any, kind))}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return [kind(**{key: value for key, value in row.items() if key in known}) for row in rows]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results to `path` as JSON lines, atomically."""
    write_records(path, results)


def merge_results(path: Path, results: Iterable[Result]) -> None:
    """Write results to `path`; existing results of other suites are kept."""
    results = list(results)
    suites = {row.suite for row in results}
    before = read_results(path) if path.exists() else []
    write_results(path, [*(row for row in before if row.suite not in suites), *results])


def read_results(path: Path) -> list[Result]:
    """Read the results of `path`; keys of a newer version are ignored."""
    return read_records(path, Result)
