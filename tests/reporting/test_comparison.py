"""Pages of several runs, of models that were only evaluated, and reports written into another folder."""

import json
import re

import pytest
from fabricated import fabricated_run
from pages import evaluated, tree

from statex.errors import UserError
from statex.reporting.page import write_comparison, write_report
from statex.results import write_results


def test_several_runs_on_one_page(tmp_path):
    folders = [fabricated_run(tmp_path / name, models=("gla",), without=("passkey",)) for name in ("one", "two")]
    html, markdown = write_comparison(folders, tmp_path / "both")
    text = html.read_text(encoding="utf-8")
    ids = [one.get("id") for one in tree(text).iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    assert len(list(tree(text).iter("h1"))) == 2
    runs = next(tree(text).iter("nav"))
    assert [(one.get("href"), one.text) for one in runs.iter("a")] == [("#r1", "fabricated"), ("#r2", "fabricated")]
    names = re.findall(r"\]\((figures/[^)]+)\)", markdown.read_text(encoding="utf-8"))
    assert len(set(names)) == len(names)
    assert all((tmp_path / "both" / name).is_file() for name in names)


def test_a_model_that_was_only_evaluated_has_a_page(tmp_path):
    html, markdown = write_report(evaluated(tmp_path / "mine", "reinit"))
    text = html.read_text(encoding="utf-8")
    titles = ["Summary", "Recall", "Text", "Long contexts", "Cost", "Seeds, versions and device", "Settings"]
    assert [one.find("h2").text for one in tree(text).iter("section")] == titles
    assert "| mine | 0.690 [0.645, 0.735]" in markdown.read_text(encoding="utf-8")
    assert "raining seed" not in text
    assert "difference" not in text


def test_models_that_were_evaluated_stand_side_by_side_after_the_runs(tmp_path):
    folders = [evaluated(tmp_path / arm, arm) for arm in ("lpt", "reinit")]
    run = fabricated_run(tmp_path / "run", models=("gla",), without=("passkey", "cost"))
    html, _ = write_comparison([folders[0], run, folders[1]], tmp_path / "both")
    root = tree(html.read_text(encoding="utf-8"))
    assert [one.text for one in root.iter("h1")] == ["fabricated", "models"]
    summary = next(one for one in root.iter("section") if one.find("h2").text == "Summary")
    assert [row.find("th/span").text for row in summary.iter("tr") if row.find("td") is not None] == ["lpt", "reinit"]


def test_evaluations_that_cannot_be_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [evaluated(tmp_path / parent / "same", "lpt") for parent in ("a", "b")]
    with pytest.raises(UserError, match="run = 'same, same': has a name twice"):
        write_comparison(folders, tmp_path / "both")
    (folders[0] / "results.jsonl").unlink()
    with pytest.raises(UserError, match=re.escape("has no results.jsonl; let the evaluation end")):
        write_report(folders[0])


def test_tasks_that_an_evaluation_lacked_are_named_too(tmp_path):
    task = {"task": "swde", "reason": "no data", "command": "fetch it"}
    folder = evaluated(tmp_path / "mine", "reinit")
    (folder / "not_run.json").write_text(json.dumps([task]))
    page = write_report(folder)[1].read_text(encoding="utf-8")
    assert "| swde | no data | fetch it |" in page
    write_results(folder / "results.jsonl", [])  # as where nothing at all could be run
    assert "| swde | no data | fetch it |" in write_report(folder)[1].read_text(encoding="utf-8")


def test_a_report_in_another_folder_can_be_written_again_from_there(tmp_path):
    run = fabricated_run(tmp_path / "run", models=("gla",), without=("passkey",), seeds=(0, 1, 2, 3, 4))
    first = [path.read_text(encoding="utf-8") for path in write_report(run, tmp_path / "published")]
    assert not (run / "report.md").exists()
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert names == {"recipe.toml", "results.jsonl", "report.html", "report.md", "figures"}
    assert [path.read_text(encoding="utf-8") for path in write_report(tmp_path / "published")] == first
    assert "seeds 0, 1, 2, 3 and 4" in first[1]
