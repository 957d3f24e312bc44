"""The benchmarks on a CPU: right results with their ratio, whole JSON, and a clear word about an unknown case."""

import json

import pytest

from statex.benchmarking import run_model_benchmark, run_ops_benchmark
from statex.errors import UserError


def test_a_case_is_checked_timed_and_written(tmp_path):
    records = run_ops_benchmark(["ssd-64x64-n128"], tmp_path / "out", device="cpu", repetitions=1)
    assert {record["pass"] for record in records} == {"fwd", "fwd+bwd"}
    assert all(record["correct"] and record["device"] and record["versions"] for record in records)
    assert json.loads((tmp_path / "out" / "ops.json").read_text()) == json.loads(json.dumps(records))


@pytest.mark.parametrize("run", [run_ops_benchmark, run_model_benchmark])
def test_an_unknown_case_lists_the_known_ones(run, tmp_path):
    with pytest.raises(UserError, match=r"case = 'nothing': is unknown; use one of \w+"):
        run(["nothing"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
