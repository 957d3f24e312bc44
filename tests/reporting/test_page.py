"""The page of a run: every section, the figures of the results, one file without references, Markdown beside it."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated import VERSIONS, fabricated_run, rewrite

import statex
from statex.errors import UserError
from statex.reporting.page import write_comparison, write_report
from statex.reporting.wording import figure
from statex.results import Result, read_results, write_results

SECTIONS = [
    "Verdict",
    "Recall",
    "Paired differences",
    "Passkey",
    "Text",
    "Needle in repeated noise (S-NIAH-1)",
    "In-context learning of symbols",
    "Variable tracking",
    "State and parameters",
    "Cost",
    "Seeds, versions and device",
    "Recipe",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A made-up run with three seeds and the optional suites: (folder, HTML, Markdown)."""
    folder = fabricated_run(tmp_path_factory.mktemp("whole"), seeds=(0, 1, 2), extra=True)
    html, markdown = write_report(folder)
    return folder, html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def tree(html):
    """The page as a tree; fails where a tag is not closed."""
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def section(html, title):
    """The words of a section."""
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return " ".join("".join(found.itertext()).split())


def test_sections_in_order(whole):
    _, html, markdown = whole
    assert [one.find("h2").text for one in tree(html).iter("section")] == SECTIONS
    assert re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE) == SECTIONS


def test_one_file_without_references(whole):
    _, html, _ = whole
    assert len(html.encode()) < 3_000_000
    links = re.findall(r'(?:src|href|action|srcset)\s*=\s*"([^"]*)"', html)
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)|https?:|<script|<link|<iframe", html)


def test_html_is_well_formed_and_its_ids_unique(whole):
    _, html, _ = whole
    root = tree(html)
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', html)
    assert set(used) <= set(ids)
    for drawing in root.iter("svg"):
        assert drawing.get("role") == "img"
        assert drawing.get("aria-label")


def test_figures_equal_the_results(whole):
    folder, html, markdown = whole
    results = read_results(folder / "results.jsonl")
    shown = [row for row in results if row.seed is None and row.suite != "run"]
    assert len(shown) > 500
    pages = [" ".join("".join(tree(html).itertext()).split()), markdown]
    for row in shown:
        text = figure(row.value, row.unit, signed=row.baseline is not None)
        low, high = (figure(bound, row.unit, signed=row.baseline is not None) for bound in (row.low, row.high))
        for page in pages:
            assert re.search(rf"{re.escape(text)}\s+{re.escape(f'[{low}, {high}')}", page), row


def test_recall_table_has_the_cell_of_each_arm(whole):
    _, html, _ = whole
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == "Recall")
    table = next(found.iter("table"))
    heads = ["".join(cell.itertext()) for cell in table.find("thead").iter("th")]
    assert heads == ["arm", *(f"{pairs} pairs, {4 * pairs} tokensn = 200" for pairs in (4, 8, 16, 32))]
    rows = {
        row.find("th/span").text: ["".join(cell.itertext()) for cell in row.iter("td")]
        for row in table.iter("tr")
        if row.find("td") is not None
    }
    assert rows["reinit"][3] == "0.690 [0.645, 0.735]"
    assert rows["lpt"][3] == "0.420 [0.375, 0.465]"


def test_every_mean_has_n_and_interval(whole):
    _, html, _ = whole
    for title in SECTIONS[1:8]:
        found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
        for table in found.iter("table"):
            heads = ["".join(cell.itertext()) for cell in table.find("thead").iter("th")]
            assert "n" in heads or all("n = " in head for head in heads[1:])
        words = section(html, title)
        assert "no interval" not in words
        assert "Training seeds 0, 1 and 2." in words


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


def cells(html, title):
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return ["".join(cell.itertext()) for cell in found.iter("td")]


def test_markdown_refers_to_figures_that_exist(whole):
    folder, _, markdown = whole
    names = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(names) > 20
    assert {folder / name for name in names} == set((folder / "figures").iterdir())
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "var(--" not in text
    assert not list(folder.glob(".*"))


def test_arms_differ_without_colour(whole):
    folder, _, _ = whole
    drawing = (folder / "figures" / "recall-gla.svg").read_text(encoding="utf-8")
    uncoloured = re.sub(r"#[0-9a-f]{6}", "", drawing)
    dashes = set(re.findall(r"stroke-dasharray: [^;\"]*", uncoloured))
    assert len(dashes) >= 3  # and the arms with solid lines differ in their markers
    assert len(set(re.findall(r'<path id="m[^"]*" d="([^"]*)"', uncoloured))) >= 5


def test_one_seed_is_said_and_near_zero_accuracy_shows_answer_nll(tmp_path):
    html = write_report(fabricated_run(tmp_path))[0].read_text(encoding="utf-8")
    assert "One training seed (0): the intervals are over items only" in section(html, "Verdict")
    passkey = section(html, "Passkey")
    assert "Passkey, mamba2: answer NLL by length and depth" in passkey
    assert "Passkey, gla: answer NLL by length and depth" not in passkey
    assert "past the training length" in section(html, "Text")


def test_what_was_not_run_says_so(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "ar_hits", "cost", "state", "control"))
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    for title in ("Passkey", "State and parameters", "Cost"):
        assert section(html, title).count("Not run.") == 1, title
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


def test_seeds_that_were_not_combined_show_their_range(tmp_path):
    fabricated_run(tmp_path, seeds=(0, 1, 2), models=("gla",), without=("passkey", "nll_by_position"))
    rewrite(tmp_path, lambda row: None if row.seed is None and row.suite != "run" else row)
    rewrite(tmp_path, lambda row: replace(row, value=row.value + row.seed / 100) if row.suite == "mqar" else row)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "0.700 0.690 to 0.710 (seeds)" in section(html, "Recall").replace("0.7000.690", "0.700 0.690")
    assert "no interval" in section(html, "Verdict")


def test_names_are_escaped(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    rewrite(tmp_path, lambda row: replace(row, device="<b>&'\"|", note="a <note> | b"))
    html, markdown = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    assert "<b>&'\"|" in section(html, "Cost")
    assert all(line.count("|") - line.count("\\|") >= 3 for line in markdown.splitlines() if line.startswith("| "))


def test_several_runs_on_one_page(tmp_path):
    folders = [fabricated_run(tmp_path / name, models=("gla",), without=("passkey",)) for name in ("one", "two")]
    html, markdown = write_comparison(folders, tmp_path / "both")
    text = html.read_text(encoding="utf-8")
    ids = [one.get("id") for one in tree(text).iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    assert len(list(tree(text).iter("h1"))) == 2
    names = re.findall(r"\]\((figures/[^)]+)\)", markdown.read_text(encoding="utf-8"))
    assert len(set(names)) == len(names)
    assert all((tmp_path / "both" / name).is_file() for name in names)


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
import statex.reporting.model_card, statex.reporting.page
print(json.dumps(list(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "matplotlib.pyplot"} & set(json.loads(done.stdout))


def test_needles_at_many_lengths_and_with_another_key(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    common = {"model": "gla", "seed": 0, "n": 50, "unit": "fraction", "low": 0.2, "high": 0.9}
    cells = [
        Result(
            "niah_multikey", "accuracy", 0.5, arm=arm, slice={"length": length, "depth": 0.5, "keys": keys}, **common
        )
        for arm in ("lpt", "reinit")
        for length in (1024, 2048, 4096, 8192, 65536)
        for keys in (2, 4)
        if (arm, length) != ("lpt", 65536)
    ]
    write_results(tmp_path / "results.jsonl", [*read_results(tmp_path / "results.jsonl"), *cells])
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    words = section(html, "Needle among other keys")
    assert "accuracy, keys 2 by length and depth (n = 50" in words
    assert "accuracy, keys 4 by length and depth (n = 50" in words
    drawing = next((tmp_path / "figures").glob("niah_multikey-accuracy-gla-keys-2-lpt.svg")).read_text(encoding="utf-8")
    assert ">64K<" in drawing
    assert ">not run<" in drawing


def test_power_note_where_nothing_is_established(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    rewrite(tmp_path, lambda row: replace(row, details={"items_needed": 4321}) if row.baseline else row)
    words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Paired differences")
    assert "−0.020 [−0.065, +0.025], n needed 4,321" in words
    assert "[+0.225, +0.315], n needed" not in words
