"""statex report and statex bench."""

import json

import pytest
from calls import nothing_new


def test_report_of_something_that_is_not_a_run(call, tmp_path):
    status, _, errors = call("report", tmp_path / "none")
    assert status == 2
    assert str(tmp_path / "none") in errors
    assert nothing_new(tmp_path)


def test_bench(call, monkeypatch, tmp_path):
    asked = []

    def benchmark(name):
        return lambda **options: asked.append((name, options)) or [{"case": name}]

    monkeypatch.setattr("statex.benchmarking.run_ops_benchmark", benchmark("ops"))
    monkeypatch.setattr("statex.benchmarking.run_model_benchmark", benchmark("model"))
    monkeypatch.setattr("statex.benchmarking.run_training_benchmark", benchmark("training"))
    status, output, _ = call("bench", "ops", "--case", "gla", "--case", "ssd", "--json")
    assert (status, json.loads(output)) == (0, [{"case": "ops"}])
    assert call("bench", "model", "--out", tmp_path)[0] == 0
    assert call("bench", "ops", "--sweep", "tokens", "--no-peers")[0] == 0
    change = "--set", "training.residual_precision=bf16", "--set", "training.loss_chunk=8192"
    assert call("bench", "training", *change)[0] == 0
    assert asked.pop() == (
        "training", {"cases": None, "out": None, "changes": {"residual_precision": "bf16", "loss_chunk": 8192}}
    )  # fmt: skip
    assert asked == [
        ("ops", {"cases": ["gla", "ssd"], "out": None, "sweep": None, "peers": None}),
        ("model", {"cases": None, "out": tmp_path}),
        ("ops", {"cases": None, "out": None, "sweep": "tokens", "peers": False}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--set", "training.loss_chunk=1"], "use `statex bench training`"),
        (["training", "--set", "data.seed=1"], "is not a key of the section training"),
        (["training", "--set", "training.steps=1"], "training.steps = 1: cannot be changed: the benchmark sets"),
        (["training", "--set", "training.train_only_expanded=true"], "or does not use it"),
        (["training", "--case", "gla-1.3b-64k", "--set", "training.sequence_parallel=0"], "sequence_parallel = 0"),
        (["training", "--set", "training.activation_memory=most"], "has no effect without gradient_checkpointing"),
        (["training", "--set", "training.loss_chunks=1"], "training.loss_chunks = 1: is not a known key"),
        (["training", "--set", "training.precision=fp32", "--set", "training.residual_precision=bf16"], "does not go"),
    ],
)
def test_bench_refuses_changes_that_are_not_its_own(call, arguments, message):
    status, _, errors = call("bench", *arguments)
    assert (status, message in errors) == (2, True)


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_bench_refuses_a_folder_that_cannot_be_before_it_measures(call, monkeypatch, tmp_path, name):
    monkeypatch.setattr("statex.benchmarking.run_ops_benchmark", lambda **options: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    status, _, errors = call("bench", "ops", "--out", tmp_path / name)
    assert status == 2
    assert f"--out = '{tmp_path / name}'" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bench_draws_a_sweep(call, tmp_path):
    case = ["--case", "ssd-64x64-n512-1k", "--case", "ssd-64x64-n512-4k"]
    status, output, _ = call("bench", "ops", "--sweep", "tokens", *case, "--out", tmp_path)
    figure = tmp_path / "ops-tokens.svg"
    assert (status, output.strip()) == (0, str(figure))
    drawn = figure.read_text()
    figure.unlink()
    status, output, _ = call("bench", "ops", "--redraw", tmp_path / "ops-tokens.json", "--json")
    assert (status, json.loads(output)) == (0, {"figure": str(figure)})
    assert figure.read_text() == drawn


@pytest.mark.parametrize("options", [["--sweep", "state"], ["--no-peers"], ["--redraw", "ops-state.json"]])
def test_bench_of_models_has_no_sweep(call, options):
    status, _, errors = call("bench", "model", *options)
    assert status == 2
    assert "use `statex bench ops`" in errors
