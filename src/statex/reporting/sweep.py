"""The figure of a sweep of `statex bench ops`: cost against the size of the state or the tokens, as one SVG."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.reporting.render.figures import Line, LineChart, line_charts
from statex.reporting.render.panels import in_words
from statex.reporting.wording import listing
from statex.utils.atomic import write_text_atomic

Record = dict[str, Any]  # of `run_ops_benchmark`

AXES = {  # sweep -> title, the record's key on the x axis, that axis
    "state": ("Cost against the size of the state", "state_size", "state elements of a layer"),
    "tokens": ("Cost against the number of tokens", "tokens", "tokens"),
}
PEER, FLOOR = "peer", "floor"
STYLES = {"statex": "statex", PEER: "lpt", FLOOR: "base"}  # whose curve -> the kind of arm whose style it has


@dataclass(frozen=True)
class Quantity:
    """The quantity that a chart shows for one pass.

    Args:
        keys: whose curve -> the record's key.
        per_token: conversion to the printed unit for quantities that grow with the tokens, None for others.
    """

    title: str
    run: str
    keys: dict[str, str]
    per_token: float | None = None


TIMES = {"statex": "ms", PEER: "peer_ms", FLOOR: "floor_ms"}
QUANTITIES = (
    Quantity("forward, ns per token", "fwd", TIMES, 1e6),
    Quantity("with backward, ns per token", "fwd+bwd", TIMES, 1e6),
    Quantity(
        "peak memory with backward, KB per token", "fwd+bwd", {"statex": "peak_bytes", PEER: "peer_peak_bytes"}, 1e-3
    ),
)
RATIOS = (  # where there are no times: on a CPU
    Quantity("forward, times as fast as the peer", "fwd", {"statex": "ratio"}),
    Quantity("with backward, times as fast as the peer", "fwd+bwd", {"statex": "ratio"}),
)


def write_sweep(path: Path) -> Path:
    """Draw the sweep whose records are in a JSON file; returns the SVG file next to it.

    Raises:
        UserError: the file is not there, or holds no sweep.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError("sweep", str(path), "cannot be read as JSON", "give a file that a sweep wrote") from None
    if not isinstance(records, list) or not records or records[0].get("sweep") not in AXES:
        remedy = "give a file that `statex bench ops --sweep` wrote"
        raise UserError("sweep", str(path), "holds no records of a sweep", remedy)
    drawing = path.with_suffix(".svg")
    write_text_atomic(drawing, sweep_picture(records))
    return drawing


def sweep_picture(records: Sequence[Record]) -> str:
    """A row of charts for each recurrence, as SVG; a case with wrong results is named and has no point."""
    title, key, label = AXES[records[0]["sweep"]]
    timed = any(record.get("ms") is not None for record in records)
    rows = []
    for op in dict.fromkeys(record["op"] for record in records):
        of_op = [record for record in records if record["op"] == op]
        charts = [_chart(op, of_op, quantity, key, label) for quantity in (QUANTITIES if timed else RATIOS)]
        rows.append([chart for chart in charts if chart is not None])
    words = "\n".join(in_words(chart) for row in rows for chart in row)
    return line_charts(title, _about(records, key), [row for row in rows if row], _wrong(records), words)


def _chart(op: str, records: Sequence[Record], quantity: Quantity, key: str, label: str) -> LineChart | None:
    found = sorted((record for record in records if record["pass"] == quantity.run), key=lambda one: one[key])
    lines = []
    for whose, of_record in quantity.keys.items():
        points = [record for record in found if record.get(of_record) is not None]
        if points:
            y = [_value(record, of_record, quantity.per_token) for record in points]
            name = points[0]["peer"] if whose == PEER else whose
            lines.append(Line(name, STYLES[whose], [record[key] for record in points], y, [None] * len(y)))
    if not lines:
        return None
    level = None if quantity.per_token else ("as fast", 1.0)
    return LineChart(label, f"{op}: {quantity.title}", lines, level=level, from_zero=True)


def _value(record: Record, key: str, per_token: float | None) -> float:
    return record[key] if per_token is None else record[key] * per_token / record["tokens"]


def _about(records: Sequence[Record], key: str) -> str:
    """What all points have in common, and where they were measured."""
    fixed, unit = ("tokens", "tokens") if key == "state_size" else ("state_size", "state elements")
    shared = [f"{size:,}" for size in sorted({record[fixed] for record in records})]
    parts = [f"{listing(shared)} {unit}"]
    peers = sorted({record["peer"] for record in records if record["peer"]})
    if peers:
        parts.append(f"peer{'s' if len(peers) > 1 else ''} {listing(peers)}")
    first = records[0]
    return ", ".join([*parts, first["dtype"], first["device"], f"source {first['commit']}"])


def _wrong(records: Sequence[Record]) -> str:
    wrong = list(dict.fromkeys(record["case"] for record in records if not record["correct"]))
    return f"Wrong results, so not timed: {listing(wrong)}" if wrong else ""
