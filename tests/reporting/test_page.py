"""The page of a run: every section, one file without references, Markdown beside it; several runs on one."""

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated import VERSIONS, evaluated, fabricated_run, rewrite
from markup import cells, section, tree

import statex
from statex.errors import UserError
from statex.reporting.page import write_comparison, write_report

SECTIONS = [
    "Verdict",
    "Aims",
    "Diagnosis",
    "Recall",
    "Text",
    "Long contexts",
    "In-context learning",
    "Other measures",
    "Not run",
    "State and parameters",
    "Cost",
    "Paired differences",
    "Seeds, versions and device",
    "Recipe",
]


def test_sections_in_order(whole):
    _, html, markdown = whole
    assert [one.find("h2").text for one in tree(html).iter("section")] == SECTIONS
    assert re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE) == SECTIONS


def test_one_file_without_references(whole):
    _, html, _ = whole
    assert len(html.encode()) < 3_000_000
    links = re.findall(r'(?:src|href|action|srcset)\s*=\s*"([^"]*)"', html)
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)|https?:|<script|<link|<iframe", html)
    assert html.startswith("<!DOCTYPE html>")


def test_the_page_opens_with_verdict_one_picture_and_one_table(whole):
    _, html, markdown = whole
    body = tree(html).find("body")
    assert [one.tag for one in body] == ["header", "main"]
    assert [one.tag for one in body.find("main")][:2] == ["section", "nav"]
    first = body.find("main/section")
    kinds = [one.get("class") or one.tag for one in first]
    assert kinds == ["h2", "lead", "lead", "figure", "table", "note", "note"]
    labels = [drawing.get("alt") for drawing in first.iter("img")]
    assert [label.split(".")[0] for label in labels] == [
        "gla: accuracy against pairs", "mamba2: accuracy against pairs"
    ]  # fmt: skip
    rows = [["".join(cell.itertext()) for cell in row] for row in first.iter("tr")]
    assert rows[0][:4] == ["model", "arm", "recall at 32 pairsn = 200", "minus lpt"]
    assert rows[3][:5] == ["gla", "reinit", "0.690 [0.645, 0.735]", "✓ +0.27 [+0.22, +0.31]", "✗ +3.8 % [+3.2, +4.3]"]
    assert rows[8][3] == "✗ −0.02 [−0.07, +0.02]"
    start = markdown.index("## Verdict")
    assert start < markdown.index("![gla: accuracy") < markdown.index("| model | arm |") < markdown.index("## Aims")


def test_html_is_well_formed_and_its_ids_unique(whole):
    _, html, _ = whole
    root = tree(html)
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', html)
    assert set(used) <= set(ids)
    drawings = list(root.iter("img"))
    assert len(drawings) > 50
    for drawing in drawings:
        assert drawing.get("alt")
        ElementTree.fromstring(base64.b64decode(drawing.get("src").partition(",")[2]))


def test_cost_state_origin_and_recipe(whole):
    folder, html, _ = whole
    state = section(html, "State and parameters")
    assert "2,048 5,120 × 2.50 20.0 KiB 132,608 +28.22 % 28,672" in re.sub(
        r"(?<=\d)(?=× )", " ", " ".join(cells(html, "State and parameters"))
    )
    assert "layer" in state
    cost = section(html, "Cost")
    assert "Fabricated Processor, 2 threads" in cost
    assert "(seeds)" in cost
    origin = section(html, "Seeds, versions and device")
    assert all(version in origin for version in VERSIONS.values())
    assert "0123456789ab" in origin
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    assert recipe.rstrip() in "".join(next(tree(html).iter("pre")).itertext())


def test_names_are_escaped(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    hostile = "<b>&'\"|**x** [y](http://z) [u](#T) `w`"
    rewrite(tmp_path, lambda row: replace(row, device=hostile, note=f"a <note> | b ```\n# {hostile}"))
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    assert hostile in section(html, "Cost")
    assert hostile in section(html, "Diagnosis")
    text = re.sub(r"</?(details|summary)>", "", markdown.split("## Recipe")[0])
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"(?<!\\)\]\((http|#T)", text)
    assert 'href="#r1-t"' not in html
    assert "**x**" not in text
    assert not re.search(r"^# <|^# \*", text, flags=re.MULTILINE)
    assert all(line.count("|") - line.count("\\|") >= 3 for line in markdown.splitlines() if line.startswith("| "))


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


def test_evaluations_of_the_same_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [evaluated(tmp_path / parent / "same", "lpt") for parent in ("a", "b")]
    with pytest.raises(UserError, match="run = 'same, same': has a name twice"):
        write_comparison(folders, tmp_path / "both")
    (folders[0] / "results.jsonl").unlink()
    with pytest.raises(UserError, match=re.escape("has no results.jsonl; let the evaluation finish")):
        write_report(folders[0])


def test_a_report_in_another_folder_can_be_written_again_from_there(tmp_path):
    run = fabricated_run(tmp_path / "run", models=("gla",), without=("passkey",), seeds=(0, 1, 2, 3, 4))
    first = [path.read_text(encoding="utf-8") for path in write_report(run, tmp_path / "published")]
    assert not (run / "report.md").exists()
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert names == {"recipe.toml", "results.jsonl", "report.html", "report.md", "figures"}
    assert [path.read_text(encoding="utf-8") for path in write_report(tmp_path / "published")] == first
    assert "seeds 0, 1, 2, 3 and 4" in first[1]


def test_a_second_report_is_the_same(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey",))
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


@pytest.mark.parametrize("missing", ["recipe.toml", "results.jsonl"])
def test_a_folder_that_is_not_a_run(tmp_path, missing):
    fabricated_run(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=re.escape(missing)):
        write_report(tmp_path)


def test_needs_no_torch():
    """`import statex` itself loads torch, to register its models; here the package stands without its __init__."""
    code = f"""
import json, sys, types
package = types.ModuleType("statex")
package.__path__ = [{str(Path(statex.__file__).parent)!r}]
sys.modules["statex"] = package
import statex.reporting.page
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "matplotlib.pyplot"} & set(json.loads(done.stdout))
