"""Measuring recall, text and cost: `measure_model` runs suites on a model, `compare_arms` compares arms item by item.

The names below are imported on first use: a recipe needs the settings of the suites, but no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statex.evaluation.compare import compare_arms
    from statex.evaluation.context import Request
    from statex.evaluation.runner import check_items, check_names, evaluate, measure_model
    from statex.evaluation.suites import find_suite

_HOMES = {
    "Request": "context",
    "check_items": "runner",
    "check_names": "runner",
    "compare_arms": "compare",
    "evaluate": "runner",
    "find_suite": "suites",
    "measure_model": "runner",
}

__all__ = [
    "Request",
    "check_items",
    "check_names",
    "compare_arms",
    "evaluate",
    "find_suite",
    "measure_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
