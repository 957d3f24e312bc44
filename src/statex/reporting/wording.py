"""The wording of values, metrics and slices, the same in tables, pictures and sentences."""

import math
from collections.abc import Callable
from typing import Any

from statex.reporting.run import Measure, Shown
from statex.results import Result
from statex.results.suites import SUITES

NOT_RUN = "not run"

METRICS = {
    "accuracy": "accuracy",
    "answer_nll": "answer NLL",
    "hit_nll": "NLL, hits",
    "other_nll": "NLL, other tokens",
    "long_gap_nll": "NLL, long-gap hits",
    "hit_share": "share of hits",
    "nll": "NLL",
    "training_tokens_per_second": "training tokens/s",
    "training_peak_memory": "training peak memory",
    "training_data_wait": "share of training time spent waiting for data",
    "prefill_tokens_per_second": "prefill tokens/s",
    "decode_ms_per_token": "decode ms/token",
    "decode_graph_ms_per_token": "decode ms/token, captured graph",
    "seconds": "time",
    "state_elements": "state elements",
    "state_bytes": "state",
    "cost state_bytes": "whole cache, with convolutions",
    "parameters": "parameters",
    "fresh_parameters": "fresh parameters",
    "new_state_energy": "energy in new entries",
    "effective_rank_without_new_state": "effective rank, new entries zeroed",
    "nll_rise_without_new_state": "rise of text NLL, new entries zeroed",
    "recall_drop_without_new_state": "drop of recall, new entries zeroed",
    "weight_change": "change of fresh tensors",
}
STAGES = {"pretrain": "pre-training", "train": "post-training", "evaluate": "evaluation"}
_NEUTRAL = {"hit_share", "recall_share"}
_LOWER_IS_BETTER = ("nll", "perplexity", "seconds", "_ms", "ms_", "memory", "bytes", "wait")
_WHOLE = {"elements", "parameters", "tokens", "count", "tokens/s"}


def suite_title(suite: str) -> str:
    """A suite's name in words; one of lm-eval's tasks keeps its own."""
    return SUITES[suite].title if suite in SUITES else suite


def short_title(suite: str) -> str:
    """The same in few words."""
    return SUITES[suite].short_title if suite in SUITES else suite


def metric_title(metric: str) -> str:
    """A metric's name in words."""
    return METRICS.get(metric, metric.replace("_", " "))


def slice_title(values: dict[str, Any]) -> str:
    """A slice in words: {"num_pairs": 32} is "32 pairs"."""
    values = dict(values)
    parts = []
    if "num_pairs" in values:
        parts.append(f"{values.pop('num_pairs')} pairs")
    if "from" in values and "to" in values:
        parts.append(f"positions {values.pop('from'):,} to {values.pop('to'):,}")
    if "symbols" in values:
        parts.append(f"{values.pop('symbols')} symbols")
    for key, value in sorted(values.items(), key=lambda item: item[0] != "length"):
        name = {"stage": ""}.get(key, key.replace("_", " ") + " ")
        parts.append(name + (STAGES.get(value, value) if isinstance(value, str) else format_number(value)))
    return ", ".join(parts)


def measure_title(measure: Measure) -> str:
    """A measure in words: metric and slice."""
    where = slice_title(measure.values)
    name = METRICS.get(f"{measure.suite} {measure.metric}") or metric_title(measure.metric)
    return name + (f", {where}" if where else "")


def suite_measure_title(measure: Measure) -> str:
    """A measure in words, its suite before it: "MQAR: accuracy, 32 pairs"."""
    return f"{short_title(measure.suite)}: {measure_title(measure)}"


def better(metric: str, difference: float) -> bool | None:
    """Whether a difference is an improvement, None where the metric has no good direction."""
    if metric in _NEUTRAL:
        return None
    return (difference < 0) == any(part in metric for part in _LOWER_IS_BETTER)


def format_number(value: float) -> str:
    """A plain number: 4,096 or 0.25."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def format_value(value: float, unit: str = "", signed: bool = False) -> str:
    """A value with digits suited to its unit; bytes, seconds and milliseconds include their unit."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("−" if value < 0 else "") + "∞"
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if unit == "bytes":
        return sign + _bytes(size)
    if unit in ("s", "seconds"):
        return sign + _seconds(size)
    if unit in _WHOLE:
        return sign + f"{size:,.0f}"
    if unit == "ms":
        return sign + f"{size:.3g} ms"
    if unit in ("", "fraction", "nats", "bits") and size < 1000:
        text = f"{size:.3f}"
        return sign * (float(text) != 0) + text
    return sign + f"{size:,.4g}"


def format_interval(estimate: Shown, signed: bool = False) -> str:
    """The interval "[low, high]", the range of the seeds where they were not combined, else "no interval"."""
    unit = {"ms": ""}.get(estimate.result.unit, estimate.result.unit)
    if estimate.interval is not None:
        low, high = estimate.interval
        return f"[{format_value(low, unit, signed)}, {format_value(high, unit, signed)}]"
    if estimate.spread is not None:
        low, high = estimate.spread
        return f"{format_value(low, unit, signed)} to {format_value(high, unit, signed)} (seeds)"
    return "no interval"


def format_with_interval(estimate: Shown, signed: bool = False) -> str:
    """A value and, where it has one, its interval, "+0.270 [+0.225, +0.315]", or "+0.270 (seeds +0.2 to +0.3)"."""
    value = format_value(estimate.result.value, estimate.result.unit, signed)
    if estimate.interval is None and estimate.spread is None:
        return value
    bounds = format_interval(estimate, signed)
    return f"{value} {bounds}" if estimate.interval else f"{value} (seeds {bounds.removesuffix(' (seeds)')})"


def format_difference(difference: Shown | None) -> str:
    """A difference of recall with its interval: "+0.27 [+0.22, +0.31]"."""
    return _format_change(difference, _two_digits)


def format_percent_difference(difference: Shown | None) -> str:
    """A difference in percent with its interval: "+3.8 % [+3.2, +4.3]"."""
    return _format_change(difference, lambda value: _signed(value, 1), " %")


def format_needs(result: Result) -> str:
    """What would establish a difference of the observed size in 4 of 5 runs, "" where that is unknown."""
    power = result.details.get("power") or {}
    items, seeds = power.get("items"), power.get("seeds")
    if seeds:
        return f"more seeds needed: {seeds:,}" + (f", with {items:,} items" if items else "")
    return f"more items needed: {items:,}" if items and result.n and items > result.n else ""


def _format_change(difference: Shown | None, form: Callable[[float], str], unit: str = "") -> str:
    if difference is None:
        return NOT_RUN
    if math.isnan(difference.result.value):
        return "not a number"
    value = form(difference.result.value) + unit
    if difference.interval is None:
        return f"{value}, no interval"
    low, high = difference.interval
    return f"{value} [{form(low)}, {form(high)}]"


def _two_digits(value: float) -> str:
    """Two decimals, or three where two would hide its sign."""
    return _signed(value, 2 if abs(value) >= 0.005 or value == 0 else 3)


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return ("−" if value < 0 else "+") * (float(text) != 0) + text


def seeds(numbers: tuple[int, ...]) -> str:
    """The seeds as a list, "–" without seeds."""
    return ", ".join(str(seed) for seed in numbers) or "–"


def listing(words: list[str]) -> str:
    """Words as an enumeration: "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _seconds(size: float) -> str:
    if size < 120:
        return f"{size:.1f} s"
    return f"{size / 60:.1f} min" if size < 7200 else f"{size / 3600:.1f} h"
