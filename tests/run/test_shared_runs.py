"""What the seeds, arms and suites of a run owe its comparison, and two processes one another."""

import errno
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from statex.cli.output import show_summary
from statex.data.mixture import TrainingBatches
from statex.data.tokenizer import train_tokenizer
from statex.errors import UserError
from statex.models.scratch import make_model
from statex.recipe import Recipe, load_recipe, parse_recipe
from statex.results import read_results
from statex.run import Chain, Selection, run_recipe, unfinished_stages
from statex.run.preflight import prepare_run
from statex.run.stages import training_stages
from statex.settings import Data
from statex.utils.atomic import locked, working_in
from tiny_recipe import CONFIGS, EVALUATION, TRAINING, data_values, write_text
from trials.full_disk import small_disk

QUICK = TRAINING | {"steps": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    return data_values(write_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    """A folder whose weights are stored in bf16."""
    folder = tmp_path_factory.mktemp("models") / "bf16"
    section = Data.model_validate(data)
    tokenizer = train_tokenizer(section.text, section.tokenizer, section.recall)
    torch.manual_seed(0)
    make_model("statex_gla", CONFIGS["statex_gla"], tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(data, checkpoint, tmp_path):
    """recipe(seeds=[0, 1]): a recipe that starts from the checkpoint, with changes."""

    def make_recipe(**changes) -> Recipe:
        values = {
            "name": "run", "output": str(tmp_path), "models": {"gla": {"checkpoint": str(checkpoint)}},
            "arms": {"base": {"kind": "base"}, "lpt": {"kind": "lpt"}}, "training": QUICK, "data": data,
            "evaluation": EVALUATION,
        }  # fmt: skip
        return parse_recipe(values | changes)

    return make_recipe


@pytest.fixture
def batches(monkeypatch) -> list[list[torch.Tensor]]:
    """The batches that each stage of training sees."""
    seen: list[list[torch.Tensor]] = []
    original = TrainingBatches.__iter__

    def recorded(self):
        seen.append([])
        for batch in original(self):
            seen[-1].append(batch["input_ids"])
            yield batch

    monkeypatch.setattr(TrainingBatches, "__iter__", recorded)
    return seen


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("from_scratch", [False, True])
def test_seeds_train_on_data_of_another_order_and_arms_of_one_seed_on_the_same(recipe, batches, from_scratch):
    model = {"family": "statex_gla", "config": CONFIGS["statex_gla"], "pretraining": QUICK}
    changes = {"models": {"gla": model}} if from_scratch else {}
    arms = {"lpt": {"kind": "lpt"}, "again": {"kind": "lpt"}}
    folder = run_recipe(recipe(seeds=[0, 1], arms=arms, **changes), evaluation=False)
    stages = [stage[: QUICK["steps"]] for stage in batches]
    of_seed = [stages[start : start + len(stages) // 2] for start in range(0, len(stages), len(stages) // 2)]
    for of_one in of_seed:
        assert same(of_one[-1], of_one[-2])  # the arms
    assert not same(of_seed[0][-1], of_seed[1][-1])
    names = [name for seed in range(2) for name in (f"lpt-seed{seed}", f"again-seed{seed}")]
    weights = [load_file(folder / "gla" / name / "trained" / "model.safetensors") for name in names]
    for one, other in zip(weights[::2], weights[1::2], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0] if "weight" in name)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_all_arms_are_measured_in_one_dtype_which_the_report_names(recipe, monkeypatch, dtype):
    from statex.evaluation import measure_model

    measured = []

    def record(network, *args, **kwargs):
        measured.append({parameter.dtype for parameter in network.parameters()})
        return measure_model(network, *args, **kwargs)

    monkeypatch.setattr("statex.evaluation.measure_model", record)
    evaluation = EVALUATION | {"suites": ["mqar"]} | ({"dtype": dtype} if dtype else {})
    folder = run_recipe(recipe(evaluation=evaluation))
    expected = dtype or "float32"
    assert measured == [{getattr(torch, expected)}] * 2
    rows = [row for row in read_results(folder / "results.jsonl") if row.arm and row.suite in ("mqar", "state")]
    assert {row.dtype for row in rows if row.seed is not None and row.baseline is None} == {expected}
    report = (folder / "report.md").read_text()
    assert f"| dtype of the measured models | {expected} |" in report
    assert "from more than one dtype" not in report


def test_nothing_to_measure_is_stated_and_not_a_failure(recipe, capsys):
    folder = run_recipe(recipe(evaluation=EVALUATION | {"suites": []}))
    rows = read_results(folder / "results.jsonl")
    assert {(row.suite, row.arm) for row in rows if row.suite == "state"} == {("state", "base"), ("state", "lpt")}
    sentence = "Nothing was measured: the recipe's evaluation.suites names no suite."
    assert sentence in (folder / "report.md").read_text()
    show_summary(folder)
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_no_task_that_could_be_run_is_stated_and_not_a_failure(recipe, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    folder = run_recipe(recipe(evaluation=EVALUATION | {"suites": ["statex_trec_fine"], "harness": {"limit": 2}}))
    (missing, *_) = [row for row in read_results(folder / "results.jsonl") if row.metric == "not_run"]
    assert [one["task"] for one in missing.details["tasks"]] == ["statex_trec_fine"]
    sentence = "Nothing was measured: none of the requested suites and tasks could be run."
    assert sentence in (folder / "report.md").read_text()
    show_summary(folder)
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_a_second_process_in_the_folder_of_a_run_is_refused(recipe, tmp_path, monkeypatch):
    settings = recipe()
    prepare_run(settings)
    with working_in(settings.folder / "gla" / "lpt-seed0", "output"):
        with pytest.raises(UserError, match=r"output = .*lpt-seed0': another process works in it \(process \d+ on "):
            run_recipe(settings)
        monkeypatch.setenv("RANK", "1")  # of torchrun: its first process holds the lock for all
        monkeypatch.setattr("statex.run.chains._run_chains", lambda *args: None)
        assert run_recipe(settings) == settings.folder
    assert [path.name for path in settings.folder.iterdir()] == ["recipe.toml"]


def test_jobs_of_different_selections_share_a_run_and_the_last_writes_the_report(recipe):
    settings = recipe(arms={"base": {"kind": "base"}, "lpt": {"kind": "lpt"}})
    prepare_run(settings)
    with locked(settings.folder / "gla" / "lpt-seed0", "output"):  # another job is at work on it
        folder = run_recipe(settings, Selection(arms=["base"]))
        with pytest.raises(UserError, match="another process works in it"):
            run_recipe(settings, Selection(arms=["lpt"]))
    assert [stage.title for stage in unfinished_stages(settings)] == ["train lpt", "evaluate lpt"]
    assert not (folder / "results.jsonl").exists()
    before = (folder / "gla" / "base-seed0" / "results.jsonl").stat().st_mtime_ns
    run_recipe(settings, Selection(arms=["lpt"]))
    assert unfinished_stages(settings) == []
    assert (folder / "report.html").exists()
    assert (folder / "gla" / "base-seed0" / "results.jsonl").stat().st_mtime_ns == before
    assert {row.arm for row in read_results(folder / "results.jsonl") if row.suite == "mqar"} == {"base", "lpt"}
    assert not list(folder.rglob(".*"))


def test_two_selections_share_a_pre_training(recipe, batches):
    """The second to come waits for the first, and does not pre-train again."""
    model = {"family": "statex_gla", "config": CONFIGS["statex_gla"], "pretraining": QUICK}
    settings = recipe(models={"gla": model}, arms={"lpt": {"kind": "lpt"}, "again": {"kind": "lpt"}})
    prepare_run(settings)
    batches.clear()
    with ThreadPoolExecutor() as pool:
        with locked(settings.folder / "gla" / "pretrained-seed0", "output"):
            waiting = pool.submit(run_recipe, settings, Selection(arms=["again"]), evaluation=False)
            assert not wait([waiting], timeout=1).done
            [stage, *_] = training_stages(settings, Chain("gla", 0, ("lpt",)))
            stage.run(lambda *event: None)
        waiting.result(timeout=60)
    assert len([stage for stage in batches if len(stage) >= QUICK["steps"]]) == 2  # pre-training and one arm


@pytest.mark.parametrize("of_earlier_version", [False, True])
def test_an_edited_evaluation_measures_what_it_changes_again(recipe, caplog, of_earlier_version):
    folder = run_recipe(recipe())
    own = folder / "gla" / "lpt-seed0"
    kept = [own / "training.json", own / "evaluation" / "items" / "nll_by_position.jsonl"]
    before = [path.stat().st_mtime_ns for path in kept]
    if of_earlier_version:
        for path in folder.rglob("section.json"):
            path.unlink()
    edited = recipe(evaluation=EVALUATION | {"mqar": EVALUATION["mqar"] | {"num_pairs": [3]}})
    run_recipe(edited)
    rows = [row for row in read_results(folder / "results.jsonl") if row.suite == "mqar"]
    assert {row.slice.get("num_pairs", 3) for row in rows} == {3}
    assert {row.arm for row in rows} == {"base", "lpt"}
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert load_recipe(folder / "recipe.toml").evaluation == edited.evaluation
    said = f"{folder}: evaluation.mqar changed; results that depend on it are replaced, arm by arm"
    assert caplog.messages.count(said) == 1
    times = [(own / name).stat().st_mtime_ns for name in ("results.jsonl", "evaluation/section.json")]
    run_recipe(edited)
    assert [(own / name).stat().st_mtime_ns for name in ("results.jsonl", "evaluation/section.json")] == times


def test_a_mistake_in_an_edited_evaluation_is_reported_before_anything_is_replaced(recipe):
    folder = run_recipe(recipe())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"evaluation\.nll_by_position\.length = 900000: no held-out document has"):
        run_recipe(recipe(evaluation=EVALUATION | {"nll_by_position": {"length": 900000}}))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_results_of_an_earlier_version_have_no_dtype(recipe):
    folder = run_recipe(recipe(evaluation=EVALUATION | {"suites": []}, arms={"base": {"kind": "base"}}))
    path = folder / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "dtype"}) + "\n" for row in rows))
    assert {row.dtype for row in read_results(path)} == {""}


@pytest.mark.parametrize(("kilobytes", "place"), [(40, "tokens"), (400, "full")])
def test_a_full_disk_is_reported_with_the_folder_and_the_run_resumes(recipe, tmp_path, kilobytes, place):
    """Full when the tokens are prepared, and in the middle of a checkpoint."""
    disk = tmp_path / "disk"
    settings = recipe(
        name="full", output=str(disk), arms={"lpt": {"kind": "lpt"}},
        training=TRAINING | {"steps": 6, "save_every": 1, "keep_checkpoints": 5},
    )  # fmt: skip
    try:
        with small_disk(disk, kilobytes):
            with pytest.raises(OSError) as caught:
                run_recipe(settings, evaluation=False)
            assert caught.value.errno == errno.ENOSPC
            assert Path(caught.value.filename).is_relative_to(disk / place)
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            run_recipe(settings, evaluation=False)
            assert (settings.folder / "gla" / "lpt-seed0" / "trained" / "model.safetensors").exists()
    except PermissionError as error:
        pytest.skip(f"cannot mount a small disk: {error}")


def test_a_full_disk_that_torch_does_not_name_is_reported(recipe, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 12800 vs 12692")

    settings = recipe(arms={"lpt": {"kind": "lpt"}}, training=TRAINING)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="unexpected pos 12800 vs 12692") as caught:
            run_recipe(settings, evaluation=False)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(settings.folder))
    run_recipe(settings, evaluation=False)
