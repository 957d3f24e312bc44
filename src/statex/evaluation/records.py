"""Scores of single items, kept as JSON lines, so that any two models can be compared item by item."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from statex.evaluation.suite import Cell
from statex.results.record import read_records, write_records


@dataclass(frozen=True)
class Score:
    """The scores of one item.

    Args:
        item: its name, the same for every model that is given the same items.
        cluster: the unit of resampling: its document, its sequence, or itself.
        slice: the cell it belongs to, for example {"length": 1024, "depth": 0.5}.
        scores: every metric measured on it.
        weights: its weight in a metric's mean, where that is not 1: its number of tokens.
        digest: hash of the prompt and the expected answer, in tokens.
        measured: facts about the item itself, for example its length in tokens.
    """

    item: str
    cluster: str
    slice: dict[str, Any]
    scores: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    measured: dict[str, Any] = field(default_factory=dict)


def item_score(cell: Cell, number: int, scores: dict[str, float], *, digest: str = "", **measured: Any) -> Score:
    """The score of item `number` of a cell, resampled by itself."""
    name = f"{cell.name}/{number}"
    return Score(name, name, cell.slice, scores, digest=digest, measured=measured)


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """Write scores as JSON lines, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, scores)


def read_scores(path: Path) -> list[Score]:
    """Read the scores of `path`; keys of a newer version are ignored."""
    return read_records(path, Score)


def digest(*parts: Sequence[int] | np.ndarray | str) -> str:
    """A short hash of token ids or text."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.asarray(part, dtype=np.int64).tobytes()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def digest_of(scores: Iterable[Score]) -> str:
    """One hash of all items, equal exactly where two models were given the same items."""
    return digest(*(f"{score.item} {score.digest}" for score in sorted(scores, key=lambda score: score.item)))


def group(scores: Iterable[Score], keys: Sequence[str]) -> dict[tuple, list[Score]]:
    """Scores by the values of some of their slice's keys, in order; scores that lack a key are left out."""
    cells: dict[tuple, list[Score]] = {}
    for score in scores:
        if all(key in score.slice for key in keys):
            cells.setdefault(tuple(score.slice[key] for key in keys), []).append(score)
    return cells
