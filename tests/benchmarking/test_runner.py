"""The benchmarks on a CPU: right results with their ratio, whole JSON, and a clear word about an unknown case."""

import json
import math

import pytest

from statex.benchmarking import run_model_benchmark, run_ops_benchmark
from statex.benchmarking.cases import SWEEPS
from statex.benchmarking.training import CASES, _section, require_same_losses
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


@pytest.mark.parametrize(("sweep", "grows"), [("state", "state_size"), ("tokens", "tokens")])
def test_a_sweep_grows_one_thing(sweep, grows, tmp_path):
    by_op = {op: [case for case in SWEEPS[sweep].values() if case.op == op] for op in ("gla", "ssd")}
    asked = [case.name for cases in by_op.values() for case in cases[-2:]]
    records = run_ops_benchmark(asked, tmp_path, sweep=sweep, device="cpu", repetitions=1)
    assert json.loads((tmp_path / f"ops-{sweep}.json").read_text()) == json.loads(json.dumps(records))
    fixed = {"state_size", "tokens"} - {grows}
    for op, cases in by_op.items():
        sizes = [getattr(case, grows) for case in cases]
        assert sizes == sorted(set(sizes), reverse=True)  # or the peers would be tuned for the smallest
        assert len(sizes) >= 4
        of_op = [record for record in records if record["op"] == op]
        assert all(record["sweep"] == sweep and record["correct"] and record["ratio"] > 0 for record in of_op)
        assert len({record[grows] for record in of_op}) == 2
        assert all(len({record[name] for record in of_op}) == 1 for name in fixed)


def test_an_unknown_sweep_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="sweep = 'heads': is unknown; use one of state, tokens"):
        run_ops_benchmark(out=tmp_path / "out", sweep="heads")
    with pytest.raises(UserError, match="case = 'gla-step-b1': is unknown; use one of gla-1x"):
        run_ops_benchmark(["gla-step-b1"], tmp_path / "out", sweep="state")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("loss", "difference"), [(20.5, 0.04), (20.5, 0.08), (10.4, 0.04)])
def test_losses_may_differ_by_the_rounding_of_logits(loss, difference):
    found = require_same_losses("case", ("plain", "compiled"), [[loss, loss], [loss, loss - difference]])
    assert found == pytest.approx(difference)


@pytest.mark.parametrize(
    ("loss", "other"), [(20.5, 20.6), (10.4, 10.45), (1.0, 1.005), (8.0, math.nan), (math.nan, 8.0)]
)
def test_losses_that_differ_by_more_are_refused_in_every_step(loss, other):
    """The bound is that of the step itself: a later one with a small loss has a small one."""
    with pytest.raises(ArithmeticError, match=r"case: in step 1, .* plain and compiled, .* differ by .*; .* 2\*\*-8"):
        require_same_losses("case", ("plain", "compiled"), [[30.0, loss, 2.0], [30.0, other, 2.0]])


def test_activations_are_kept_where_they_are_not_to_be_computed_again():
    section = _section(CASES["gla-1.3b-64k"], "plain", 65536, {"gradient_checkpointing": False})
    assert (section.gradient_checkpointing, section.activation_memory) == (False, "least")
