"""Benchmarks of the recurrences and of whole models, against the libraries of the field."""

from statex.benchmarking.ops import run_ops_benchmark

__all__ = ["run_ops_benchmark"]
