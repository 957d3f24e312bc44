"""Measuring recall, text and cost: `evaluate` runs suites on a model, `compare_arms` sets arms side by side."""

from statex.evaluation.compare import compare_arms
from statex.evaluation.runner import evaluate
from statex.evaluation.suites import SUITE_GROUPS, SUITES, expand_names, find_suite

__all__ = ["SUITES", "SUITE_GROUPS", "compare_arms", "evaluate", "expand_names", "find_suite"]
