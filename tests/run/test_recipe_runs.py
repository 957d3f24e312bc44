"""A recipe's whole run: its stages, what it skips, what it refuses, and how several processes share it."""

import json
import shutil
from collections import defaultdict
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from commands import FORKED
from statex.data.mixture import TrainingBatches
from statex.errors import UserError
from statex.expansion.stored import stored_plan
from statex.recipe import parse_recipe
from statex.results import Result, read_results
from statex.results.claims import RECALL_MARGIN
from statex.run import run_recipe
from statex.run.launch import do_in_order
from statex.run.preflight import prepare_run
from statex.run.stages import Expand, PreTrain, Train
from tiny_recipe import ARMS, CONFIGS, EVALUATION, TRAINING, changed, recipe_values, times, write_text
from tokenizer_folders import write_qwen3_5

MODELS = [family.removeprefix("statex_") for family in CONFIGS]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The values of a recipe that was run, and the batches that each stage of training saw."""
    values = recipe_values(text, tmp_path_factory.mktemp("runs"))
    values["training"] |= {"report_to": ["tensorboard"], "watch_state_every": 3}
    batches: list[list[torch.Tensor]] = []
    original = TrainingBatches.__iter__

    def recorded(self):
        batches.append([])
        for batch in original(self):
            batches[-1].append(batch["input_ids"])
            yield batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingBatches, "__iter__", recorded)
        run_recipe(parse_recipe(values))
    return values, batches


@pytest.fixture(scope="module")
def folder(finished) -> Path:
    return Path(finished[0]["output"]) / finished[0]["name"]


def measured(results: list[Result]) -> dict[tuple, tuple]:
    """The values, without what was counted in seconds and bytes of this machine."""
    return {
        (row.model, row.arm, row.seed, row.suite, row.metric, json.dumps(row.slice, sort_keys=True), row.baseline): (
            row.value, row.low, row.high, row.n,
        )
        for row in results
        if row.suite not in ("cost", "run")
    }  # fmt: skip


@pytest.mark.slow
def test_every_arm_of_every_model_is_trained_and_measured(folder):
    for model in MODELS:
        assert (folder / model / "pretrained-seed0" / "trained" / "model.safetensors").exists()
        for arm, section in ARMS.items():
            own = folder / model / f"{arm}-seed0"
            names = {path.name for path in own.iterdir()}
            changed = {"expanded", "diagnostics.jsonl"} if section["kind"] in ("statex", "control") else set()
            assert names == {"trained", "training.json", "logs", "evaluation", "results.jsonl"} | changed
            network = AutoModelForCausalLM.from_pretrained(own / "trained")
            plan = stored_plan(network.config)
            assert (plan.kind if plan else None) == {"statex": "expand", "control": "reinitialize"}.get(section["kind"])
            metrics = {(row.suite, row.metric) for row in read_results(own / "results.jsonl")}
            assert {
                ("mqar", "accuracy"), ("nll_by_position", "nll"), ("state", "state_elements"), ("cost", "seconds"),
                ("cost", "training_tokens_per_second"), ("cost", "training_peak_memory"),
                ("cost", "training_data_wait"),
            } <= metrics  # fmt: skip
    rows = read_results(folder / "results.jsonl")
    assert {row.arm for row in rows if row.baseline == "lpt"} == set(ARMS) - {"lpt"}
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "report.md").exists()
    assert not list(folder.rglob(".*"))  # nothing half-written


@pytest.mark.slow
def test_changed_arms_are_diagnosed(folder):
    rows = [row for row in read_results(folder / "results.jsonl") if row.suite == "diagnostics"]
    metrics = defaultdict(set)
    for row in rows:
        if row.baseline is None:
            metrics[row.model, row.arm].add(row.metric)
    expanded = {
        "weight_change", "new_state_energy", "effective_rank", "effective_rank_without_new_state",
        "nll_rise_without_new_state", "recall_drop_without_new_state", "new_state_energy_in_training",
        "effective_rank_in_training",
    }  # fmt: skip
    watched = [row for row in rows if row.metric == "new_state_energy_in_training"]
    assert {row.slice["step"] for row in watched} == {0, 3}
    assert all(0 < row.value < 1 for row in watched)
    for model in MODELS:
        assert metrics[model, "reinit"] == metrics[model, "preserve"] == expanded
        assert metrics[model, "control"] == {"weight_change"}
        assert metrics[model, "lpt"] == set()
    assert all(row.value > 0 for row in rows if row.metric == "weight_change")
    failures = [row for row in rows if row.baseline == "lpt"]
    assert {row.arm for row in failures} <= {"reinit", "preserve"}
    assert {row.metric for row in failures} <= {"text_lost", "recall_flat"}
    # Four steps teach no recall, but so few items rule out no gain: a sign is given only where the interval does
    assert all(row.high < RECALL_MARGIN for row in failures if row.metric == "recall_flat")


@pytest.mark.slow
def test_a_run_that_was_never_diagnosed_is_diagnosed_without_another_evaluation(finished, folder):
    results = (folder / "results.jsonl").read_text()
    own = folder / "gla" / "reinit-seed0"
    (own / "diagnostics.jsonl").unlink()
    before = times(own)
    run_recipe(parse_recipe(finished[0]))
    assert {path: time for path, time in times(own).items() if path in before} == before
    assert (folder / "results.jsonl").read_text() == results


@pytest.mark.slow
def test_the_state_grows_in_expanded_arms_only(folder):
    rows = read_results(folder / "results.jsonl")
    elements = {(row.model, row.arm): row.value for row in rows if row.metric == "state_elements" and not row.slice}
    for model, growth in (("gla", 2), ("mamba2", 4)):
        assert elements[model, "control"] == elements[model, "lpt"]
        assert elements[model, "reinit"] == elements[model, "preserve"] == growth * elements[model, "lpt"]


@pytest.mark.slow
def test_all_arms_see_the_same_tokens_in_the_same_order(finished):
    stages = [stage for stage in finished[1] if stage]
    assert len(stages) == len(MODELS) * (1 + len(ARMS))  # pre-training too, for its section is the same here
    steps = finished[0]["training"]["steps"]
    for stage in stages:
        assert all(torch.equal(a, b) for a, b in zip(stage[:steps], stages[0][:steps], strict=True))
    assert len({tuple(batch.shape) for batch in stages[0]}) > 1  # text and recall


@pytest.mark.slow
def test_an_arm_s_training_changed_it(folder):
    for model in MODELS:
        start = load_file(folder / model / "pretrained-seed0" / "trained" / "model.safetensors")
        trained = load_file(folder / model / "lpt-seed0" / "trained" / "model.safetensors")
        assert not any(torch.equal(start[name], trained[name]) for name in start)
        preserved = load_file(folder / model / "preserve-seed0" / "expanded" / "model.safetensors")
        assert any(torch.equal(start[name], preserved.get(name, start[name] + 1)) for name in start)


@pytest.mark.slow
def test_events_of_each_arm_are_its_own(folder):
    for model in MODELS:
        for arm in ARMS:
            assert len(list((folder / model / f"{arm}-seed0" / "logs").glob("events.*"))) == 1


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(finished, folder):
    values, batches = finished
    before, stages = times(folder), len(batches)
    results = (folder / "results.jsonl").read_text()
    run_recipe(parse_recipe(values))
    after = times(folder)
    assert after.keys() == before.keys()
    changed_files = {Path(path).relative_to(folder).parts[0] for path in after if after[path] != before[path]}
    assert changed_files <= {"results.jsonl", "report.html", "report.md", "figures"}
    assert (folder / "results.jsonl").read_text() == results
    assert len(batches) == stages


@pytest.mark.slow
def test_a_stage_that_is_missing_is_done_again_the_same(finished, folder):
    before = measured(read_results(folder / "results.jsonl"))
    own = folder / "gla" / "preserve-seed0"
    (own / "results.jsonl").unlink()
    (own / "training.json").unlink()
    trained = load_file(own / "trained" / "model.safetensors")
    run_recipe(parse_recipe(finished[0]))
    assert measured(read_results(folder / "results.jsonl")) == before
    again = load_file(own / "trained" / "model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.learning_rate=0.5", "training.learning_rate"),
        ("arms.preserve.expansion.init=inherit", "arms.preserve.expansion.init"),
        ("seeds=[0,1]", "seeds"),
        ("models.gla.config.hidden_size=32", "models.gla.config.hidden_size"),
    ],
)
def test_a_run_of_another_recipe_is_refused(finished, folder, override, key):
    before = times(folder)
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe(changed(finished[0], override)))
    assert f"output = '{folder}': was made by another recipe (they differ in {key}); give this run another name" in str(
        caught.value
    )
    assert times(folder) == before


@pytest.mark.slow
def test_two_workers_give_what_one_gives_and_report_what_goes_wrong(finished, folder, tmp_path, monkeypatch):
    """Three chains: the last one's checkpoint is damaged, which is reported once what had begun has ended.

    Workers are forked, for importing takes long; tests/run/test_launch.py starts them as runs do."""
    monkeypatch.setattr("multiprocessing.get_context", lambda method: FORKED)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "mamba2" / "pretrained-seed0" / "trained", checkpoint)
    values = changed(finished[0], f'output="{tmp_path}"', "workers=2", f'models.other.checkpoint="{checkpoint}"')
    values["arms"] = {name: values["arms"][name] for name in ("lpt", "preserve")}
    recipe = parse_recipe(values)
    prepare_run(recipe)
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(UserError) as caught:
        run_recipe(recipe)
    assert f"model = '{checkpoint / 'model.safetensors'}': is truncated or damaged" in str(caught.value)
    run = tmp_path / "tiny"
    assert {path.parents[1].name for path in run.glob("*/pretrained-seed0/training.json")} == set(MODELS)
    assert not (run / "results.jsonl").exists()
    before = times(run)

    (checkpoint / "model.safetensors").write_bytes(weights)
    run_recipe(recipe.model_copy(update={"workers": 1}))
    assert {path: time for path, time in times(run).items() if path in before} == before
    ours, theirs = (measured(read_results(each / "results.jsonl")) for each in (run, folder))
    shared = {key for key in ours if key[0] != "other"}
    assert len(shared) > 20
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


@pytest.fixture
def with_checkpoint(finished, folder, tmp_path) -> dict:
    """A recipe whose model is a folder; its arms are one that is evaluated only and one that is trained."""
    return {
        "name": "post", "output": str(tmp_path),
        "models": {"gla": {"checkpoint": str(folder / "gla" / "pretrained-seed0" / "trained")}},
        "arms": {"base": {"kind": "base"}, "lpt": {"kind": "lpt", "training": {"steps": 2}}},
        "training": changed(finished[0]["training"], "report_to=[]"),
        "data": finished[0]["data"],
        "evaluation": EVALUATION,
    }  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_is_measured_as_it_is_beside_its_post_training(with_checkpoint, tmp_path):
    folder = run_recipe(parse_recipe(with_checkpoint))
    assert {path.name for path in (folder / "gla" / "base-seed0").iterdir()} == {"evaluation", "results.jsonl"}
    assert json.loads((folder / "gla" / "lpt-seed0" / "training.json").read_text())["steps"] == 2
    assert not (folder / "tokenizer").exists()
    rows = read_results(folder / "results.jsonl")
    nll = {row.arm: row.value for row in rows if row.metric == "nll" and row.baseline is None and row.seed == 0}
    assert nll.keys() == {"base", "lpt"}
    assert nll["base"] != nll["lpt"]
    assert {row.metric for row in rows if row.suite == "cost" and row.arm == "base"} == {"seconds"}


@pytest.mark.slow
def test_arms_read_alike_where_transformers_chooses_the_tokenizer_by_the_model_type(text, tmp_path):
    write_qwen3_5(tmp_path / "model")
    values = {
        "name": "post", "output": str(tmp_path / "runs"),
        "models": {"qwen": {"checkpoint": str(tmp_path / "model")}},
        "arms": {name: ARMS[name] for name in ("lpt", "preserve")},
        "training": TRAINING | {"steps": 2, "weights": {"text": 1.0}},
        "data": {"text": {"files": [text], "held_out": 0.3}},
        "evaluation": EVALUATION | {"suites": ["nll_by_position"]},
    }  # fmt: skip
    folder = run_recipe(parse_recipe(values))
    rows = read_results(folder / "results.jsonl")
    assert {row.arm for row in rows if row.suite == "nll_by_position"} == {"lpt", "preserve"}


@pytest.mark.slow
def test_training_alone_then_the_rest(with_checkpoint):
    recipe = parse_recipe(with_checkpoint)
    folder = run_recipe(recipe, evaluation=False)
    assert not (folder / "results.jsonl").exists()
    assert not (folder / "gla" / "base-seed0").exists()
    before = times(folder)
    run_recipe(recipe)
    assert (folder / "results.jsonl").exists()
    assert {path: time for path, time in times(folder).items() if path in before} == before


def test_a_worker_that_was_killed_is_a_failure_of_the_machine():
    future: Future = Future()
    future.set_exception(BrokenProcessPool())
    with pytest.raises(OSError, match=r"a worker was killed, perhaps because memory ran out; the same command resumes"):
        do_in_order([((), [])], 1, lambda _: future)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "no tokenizer", "expanded"])
def test_a_checkpoint_that_cannot_be_used_is_refused_before_anything_is_written(
    with_checkpoint, folder, tmp_path, damage, text
):
    checkpoint = tmp_path / "checkpoint"
    source = folder / "gla" / ("reinit-seed0/expanded" if damage == "expanded" else "pretrained-seed0/trained")
    checkpoint.mkdir()
    for path in source.iterdir():
        if damage != "no tokenizer" or "tokenizer" not in path.name:
            (checkpoint / path.name).write_bytes(path.read_bytes())
    if damage == "truncated":
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    with_checkpoint["models"]["gla"]["checkpoint"] = str(checkpoint)
    with_checkpoint["arms"]["reinit"] = ARMS["reinit"]
    message = {
        "truncated": "is truncated or damaged",
        "no tokenizer": f"models.gla.checkpoint = '{checkpoint}': has no tokenizer; save the model's",
        "expanded": "was expanded before and cannot be expanded again",
    }[damage]
    with pytest.raises(UserError) as caught:
        run_recipe(parse_recipe(with_checkpoint))
    assert message in str(caught.value)
    assert not (tmp_path / "post").exists()


def test_each_seed_has_folders_of_its_own(text, tmp_path, monkeypatch):
    """Which stages are run for which seed; the stages themselves are left out."""
    done = defaultdict(list)
    for kind in (PreTrain, Expand, Train):
        monkeypatch.setattr(kind, "run", lambda stage, progress: done[type(stage)].append(stage))
    values = changed(recipe_values(text, tmp_path, ["mamba2"]), "seeds=[3,5]")
    run_recipe(parse_recipe(values), evaluation=False)
    assert [stage.seed for stage in done[PreTrain]] == [3, 5]
    folder = tmp_path / "tiny" / "mamba2"
    outs = [stage.start for stage in done[Expand]]
    assert outs == [
        folder / f"{arm}-seed{seed}" / "expanded" for seed in (3, 5) for arm in ("reinit", "preserve", "control")
    ]
    starts = [stage.start for stage in done[Train]]
    assert starts[0] == folder / "pretrained-seed3" / "trained"
    assert starts[1:4] == outs[:3]
