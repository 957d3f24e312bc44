"""Benchmarks of the recurrences and of whole models, against the libraries of the field."""

from statex.benchmarking.model import run_model_benchmark
from statex.benchmarking.ops import run_ops_benchmark
from statex.benchmarking.training import run_training_benchmark

__all__ = ["run_model_benchmark", "run_ops_benchmark", "run_training_benchmark"]
