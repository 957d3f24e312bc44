"""The page of a run: its sections in order, one file without references, Markdown beside it, safe names."""

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated import fabricated_run, rewrite
from pages import section, tree

import statex
from statex.errors import UserError
from statex.reporting.page import write_report

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


def test_markdown_refers_to_figures_that_exist(whole):
    folder, _, markdown = whole
    names = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(names) > 20
    assert {folder / name for name in names} == set((folder / "figures").iterdir())
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
    assert not list(folder.glob(".*"))


def test_what_was_not_run_says_so(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "ar_hits", "cost", "state", "control"))
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    for title in ("State and parameters", "Cost"):
        assert section(html, title).count("Not run.") == 1, title
    assert "Passkey gla: not run." in section(html, "Long contexts")
    assert "AR-hits: not run." in section(html, "Text")
    rows = [
        row
        for row in tree(html).iter("tr")
        if row.find("th/span") is not None and row.find("th/span").text == "control"
    ]
    assert rows
    assert all("".join(cell.itertext()) == "not run" for row in rows for cell in row.iter("td"))
    assert "| control | not run |" in markdown


def test_results_without_any_figure(tmp_path):
    fabricated_run(tmp_path)
    rewrite(tmp_path, lambda row: None)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "recall was not run" in section(html, "Verdict")
    assert "Not run." in section(html, "Recall")


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


def test_a_second_report_is_the_same(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey",))
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


@pytest.mark.parametrize("missing", ["recipe.toml", "results.jsonl"])
def test_a_folder_that_is_no_run(tmp_path, missing):
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


def test_a_group_stands_for_its_suites(tmp_path):
    fabricated_run(tmp_path, models=("gla",))
    recipe = tmp_path / "recipe.toml"
    names = 'suites = ["mqar", "passkey", "ar_hits", "nll_by_position"]'
    assert names in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(names, 'suites = ["offline"]'))
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Needle in text, UUID (S-NIAH-3) gla: not run." in section(html, "Long contexts")
    assert "Not run." in section(html, "In-context learning")


def test_tasks_without_data_are_named_with_what_would_fetch_it(whole):
    _, html, markdown = whole
    assert "piqa: acc" in section(html, "Other measures")
    assert "hf download hazyresearch/based-swde" in section(html, "Not run")
    assert "| swde | no data on this machine | hf download hazyresearch/based-swde |" in markdown
