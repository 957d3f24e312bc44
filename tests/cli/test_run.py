"""statex run and train: what they print and write, and mistakes in a recipe."""

import json
import shutil
from pathlib import Path

import pytest
from calls import eval_arguments, nothing_new

from statex.utils.atomic import working_in


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_the_start(call, gla, recipe, tmp_path):
    model = shutil.copytree(gla, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    token = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][token] += 1000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments in (
        ("eval", model, "--out", tmp_path / "out"),
        ("train", recipe, "--set", f'models.gla.checkpoint="{model}"'),
    ):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, ""), errors
        assert "its tokenizer has ids up to" in errors
    assert nothing_new(tmp_path, "model", "recipe.toml")


def test_tokens_prepared_beforehand_are_those_that_the_run_reads(call, recipe, monkeypatch):
    """As far as the recipe reads; the run tokenises nothing."""
    train = ("--set", 'arms.lpt.kind="lpt"', "--set", "training.steps=2", "--set", "training.warmup_steps=0")
    status, output, errors = call("data", "prepare", recipe, *train, "--json")
    assert status == 0, errors
    found = json.loads(output)
    assert Path(found["gla"]["folder"]).parent == recipe.parent / "runs" / "tokens"
    assert found["gla"]["num_tokens"] > 0
    monkeypatch.setattr("statex.data.tokens._prepare", None)
    assert json.loads(call("data", "prepare", recipe, *train, "--json")[1]) == found
    status, _, errors = call("train", recipe, *train)
    assert status == 0, errors
    without_text = ("--set", 'name="mqar"', "--set", "training.weights={text=0, mqar=1}")
    status, output, errors = call("data", "prepare", recipe, *train, *without_text)
    assert status == 0, errors
    assert "its training reads no text" in " ".join(output.split())


@pytest.mark.parametrize("verb", ["expand", "eval"])
def test_a_folder_that_another_process_works_in_is_refused(call, gla, tmp_path, verb):
    arguments = ("expand", gla, tmp_path / "out") if verb == "expand" else eval_arguments(gla, tmp_path / "out")
    with working_in(tmp_path / "out", "out"):
        status, output, errors = call(*arguments)
        assert (status, output) == (2, "")
        assert f"= '{tmp_path / 'out'}': another process works in it" in errors
    assert nothing_new(tmp_path)
    assert call(*arguments)[0] == 0


def test_run(call, recipe, tmp_path):
    folder = tmp_path / "runs" / "measured"
    status, output, errors = call("run", recipe, "--json")
    assert status == 0, errors
    assert json.loads(output) == {"folder": str(folder)}
    assert "evaluate base: mqar" in errors
    status, output, _ = call("run", recipe)
    assert status == 0
    assert f"report: {folder / 'report.html'}" in output
    assert "base" in output
    status, output, _ = call("train", recipe)
    assert (status, output) == (0, f"trained models in {folder}\n")
    status, output, _ = call("train", recipe, "--json")
    assert json.loads(output) == {"folder": str(folder)}
    status, output, errors = call("run", recipe, "--set", "training.steps=9", "--json")
    assert (status, output) == (2, "")
    assert "was made by another recipe (they differ in training.steps); give this run another name" in errors
    status, output, _ = call("report", folder, "--json")
    assert status == 0
    assert Path(json.loads(output)["html"]) == folder / "report.html"


def test_run_of_tasks_of_lm_eval(call, recipe, data, tmp_path, monkeypatch):
    """What lacked its data is said, and measured by a later call that finds it."""
    pytest.importorskip("lm_eval")
    import datasets

    from statex.results import read_results

    suites = ["--set", 'evaluation.suites=["mqar", "statex_trec_fine"]', "--set", "evaluation.harness.limit=2"]
    status, _, errors = call("run", recipe, *suites)
    assert status == 0, errors
    results = tmp_path / "runs" / "measured" / "results.jsonl"
    (missing,) = [row for row in read_results(results) if row.metric == "not_run"]
    assert [one["task"] for one in missing.details["tasks"]] == ["statex_trec_fine"]

    rows = [{"text": f"what is {number}?", "label": number} for number in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **options: {"train": rows, "test": rows})
    assert call("run", recipe, *suites)[0] == 0
    found = read_results(results)
    assert {row.slice["shots"] for row in found if row.suite == "statex_trec_fine"} == {16, 64, 256, 512}
    assert not [row for row in found if row.metric == "not_run"]


@pytest.mark.parametrize("verb", ["train", "run"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", "training.stepz = 5: is not a known key; remove it or correct its spelling."),
        ("training.steps=many", "training.steps = 'many': Input should be a valid integer"),
        ("steps", "--set = 'steps': is not of the form section.key=value"),
        ('data.text.files=["none/*.txt"]', "none/*.txt': no file matches; give a path or a glob of files."),
        ("arms.base.kind=lpt training={sequence_length=1000000,tokens_per_step=1000000}", "is longer than the whole"),
        ('evaluation.suites=["mqra"]', "evaluation.suites = 'mqra': is not a suite; known suites:"),
        ('models.gla.checkpoint="/none"', "is not a folder here and could not be fetched from the hub"),
    ],
)
def test_mistakes_in_a_recipe(call, recipe, tmp_path, verb, override, message):
    overrides = [part for text in override.split() for part in ("--set", text)]
    status, output, errors = call(verb, recipe, *overrides, "--json")
    assert (status, output) == (2, ""), errors
    assert message in errors
    assert "Traceback" not in errors
    assert nothing_new(tmp_path, "recipe.toml")


def test_a_recipe_that_is_not_there(call, tmp_path):
    status, _, errors = call("run", tmp_path / "none.toml")
    assert status == 2
    assert "there is no such file; give the path of a TOML recipe" in errors


def test_a_part_of_a_recipe_is_run_and_the_last_part_writes_the_report(call, recipe, tmp_path):
    text = recipe.read_text().replace("[arms.base]", "[arms.again]\nkind = 'base'\n[arms.base]")
    recipe.write_text(text)
    folder = tmp_path / "runs" / "measured"
    status, output, _ = call("run", recipe, "--arm", "base", "--model", "gla", "--seed", "0")
    assert (status, output) == (
        0, f"no report yet: 1 stages of other selections are not finished in {folder}\n",
    )  # fmt: skip
    assert not (folder / "report.html").exists()
    assert not (folder / "gla" / "again-seed0").exists()
    status, output, errors = call("run", recipe, "--arm", "x")
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1] == "statex: --arm = 'x': is not one of this recipe; known: again, base."
    status, output, _ = call("run", recipe, "--arm", "again")
    assert output.startswith(f"report: {folder / 'report.html'}\n")
    assert status == 0
