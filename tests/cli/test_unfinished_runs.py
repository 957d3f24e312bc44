"""statex report of a run that was cut off: what is finished is compared, and what is missing is said."""

import json
import shutil

import pytest
from calls import nothing_new

from statex.recipe import load_recipe
from statex.results import read_results
from statex.results.record import unfinished_arms_of
from statex.run import run_recipe
from tiny_recipe import EVALUATION, TRAINING, times, write_recipe

ARMS = {
    "base": {"kind": "base"}, "lpt": {"kind": "lpt"},
    "preserve": {"kind": "statex", "expansion": {"every": 1, "init": "preserve"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, models, tmp_path_factory):
    """A finished run of three arms and two seeds."""
    values = {
        "name": "run", "output": str(tmp_path_factory.mktemp("runs")), "seeds": [0, 1],
        "models": {"gla": {"checkpoint": str(models["statex_gla"])}}, "arms": ARMS,
        "training": TRAINING | {"steps": 2, "warmup_steps": 0}, "data": data.model_dump(exclude_none=True),
        "evaluation": EVALUATION,
    }  # fmt: skip
    path = write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.toml", values)
    return run_recipe(load_recipe(path))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it under another name, as if it had been moved."""
    return shutil.copytree(whole, tmp_path / "moved")


def cut(folder, *arms, results=True):
    """Leave the evaluation of some arms as a process leaves it that is killed in its midst."""
    for arm in arms:
        own = folder / "gla" / arm
        for name in ("results.jsonl", "diagnostics.jsonl"):
            (own / name).unlink(missing_ok=True)
        (own / "evaluation" / "items" / "nll_by_position.jsonl").unlink()
        items = own / "evaluation" / "items" / "mqar.jsonl"
        items.write_text("".join(items.read_text().splitlines(keepends=True)[:8]))  # the first cell alone
    if results:
        (folder / "results.jsonl").unlink()
        shutil.rmtree(folder / "figures")
        (folder / "report.md").unlink()


def values_of(folder, **where):
    rows = read_results(folder / "results.jsonl")
    return {
        (row.arm, row.seed, row.suite, row.metric, str(row.slice), row.baseline): row.value
        for row in rows
        if row.suite not in ("run", "cost") and all(getattr(row, name) == value for name, value in where.items())
    }


def test_an_arm_cut_in_its_evaluation_is_missing_and_breaks_nothing(call, whole, folder):
    cut(folder, "preserve-seed0", "lpt-seed1")
    status, output, errors = call("report", folder)
    assert status == 0, errors
    words = " ".join(output.split())
    assert f"{folder / 'report.html'} {folder / 'report.md'}" in words
    said = (
        "This run is not finished: 2 of 6 arms and seeds are missing or not whole, and what follows is about the "
        "others. statex run RECIPE resumes it.",
        "gla: not evaluated: lpt (seed 1), preserve (seed 0).",
    )
    page = (folder / "report.md").read_text().replace("**", "").replace("`", "")
    for part in said:
        assert part in words
        assert part in page
    found = values_of(folder)
    assert {key[:2] for key in found if key[-1] is None and key[1] is not None} == {
        ("base", 0), ("base", 1), ("lpt", 0), ("preserve", 1),
    }  # fmt: skip
    assert {key[:2] for key in found if key[-1] == "lpt" and key[1] is not None} == {("base", 0)}
    before = values_of(whole)
    assert all(found[key] == before[key] for key in found if key[1] is not None)


def test_what_is_missing_is_in_json_and_on_a_page_elsewhere(call, folder, tmp_path):
    """And the copy of a partial run is one."""
    cut(folder, "preserve-seed0")
    status, output, errors = call("report", folder, "--out", tmp_path / "page", "--json")
    assert status == 0, errors
    missing = [{"model": "gla", "arm": "preserve", "seed": 0, "lacks": "evaluated"}]
    assert json.loads(output)["unfinished"] == {str(folder): missing}
    assert call("report", tmp_path / "page")[1].count("not evaluated: preserve (seed 0).") == 1
    assert "not evaluated: preserve (seed 0)." in (tmp_path / "page" / "report.md").read_text()
    assert call("report", folder, tmp_path / "page", "--out", tmp_path / "both")[0] == 0


def test_each_arm_is_named_with_what_it_lacks(call, folder):
    cut(folder, "base-seed1")
    own = folder / "gla"
    (own / "preserve-seed0" / "diagnostics.jsonl").unlink()
    for name in ("results.jsonl", "diagnostics.jsonl", "training.json"):
        (own / "preserve-seed1" / name).unlink()
    shutil.rmtree(own / "lpt-seed1")
    shutil.rmtree(own / "lpt-seed0" / "trained")  # to save space: it is evaluated
    status, output, errors = call("report", folder)
    assert status == 0, errors
    sentence = (
        "gla: not evaluated: base (seed 1); not trained: lpt (seed 1), preserve (seed 1); "
        "not diagnosed: preserve (seed 0).\n"
    )
    assert output.endswith(sentence)


def test_a_run_of_which_nothing_is_evaluated_yet(call, folder):
    cut(folder, "base-seed0", "base-seed1", "lpt-seed0", "lpt-seed1", "preserve-seed0", "preserve-seed1")
    status, output, errors = call("report", folder)
    assert status == 0, errors
    assert "6 of 6 arms and seeds are missing" in output
    assert "gla: not evaluated: base (seeds 0 and 1), lpt (seeds 0 and 1), preserve (seeds 0 and 1)." in output
    assert "Nothing was measured" not in (folder / "report.md").read_text()
    assert not values_of(folder)


def test_the_run_resumes_to_the_results_of_one_that_was_never_cut(call, whole, tmp_path):
    """Though a report was written in between."""
    folder = shutil.copytree(whole, tmp_path / "run")
    recipe = load_recipe(folder / "recipe.toml", [f'output="{tmp_path}"'])
    cut(folder, "preserve-seed0")
    assert call("report", folder)[0] == 0
    assert unfinished_arms_of(read_results(folder / "results.jsonl"))
    run_recipe(recipe)
    assert values_of(folder) == values_of(whole)
    assert not unfinished_arms_of(read_results(folder / "results.jsonl"))
    assert "not finished" not in (folder / "report.md").read_text()
    status, output, _ = call("report", folder)
    assert (status, output.split()) == (0, [str(folder / "report.html"), str(folder / "report.md")])


def test_a_finished_run_is_reported_from_its_results(call, folder):
    """Also where what was trained is gone, or what was evaluated."""
    before = (folder / "results.jsonl").read_bytes(), times(folder / "gla")
    assert call("report", folder)[0] == 0
    assert ((folder / "results.jsonl").read_bytes(), times(folder / "gla")) == before
    shutil.rmtree(folder / "gla" / "lpt-seed0")
    assert call("report", folder)[0] == 0
    shutil.rmtree(folder / "gla")
    assert call("report", folder)[0] == 0
    assert (folder / "results.jsonl").read_bytes() == before[0]


def test_an_evaluation_that_was_edited_and_cut_is_not_finished(call, folder):
    """The results are those of the settings before; the arms that still are so do not count."""
    from statex.run.measuring import begin_evaluation

    recipe = load_recipe(folder / "recipe.toml", ["evaluation.mqar.num_items=4"])
    text = (folder / "recipe.toml").read_text().replace("num_items = 8", "num_items = 4")
    (folder / "recipe.toml").write_text(text)
    begin_evaluation(folder / "gla" / "preserve-seed1", recipe.evaluation)
    assert "6 of 6 arms and seeds are missing" in call("report", folder)[1]


def test_a_recipe_alone_is_no_run(call, recipe):
    status, _, errors = call("report", recipe.parent)
    assert status == 2
    assert "has no results.jsonl" in errors
    assert nothing_new(recipe.parent, "recipe.toml")
