"""The page of a run: every section, the figures of the results, one file without references, Markdown beside it."""

import base64
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
from statex.reporting.wording import format_value
from statex.results import Result, read_results, write_results

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


def test_figures_equal_the_results(whole):
    folder, html, markdown = whole
    results = read_results(folder / "results.jsonl")
    shown = [row for row in results if row.seed is None and row.suite != "run"]
    assert len(shown) > 500
    pages = [" ".join("".join(tree(html).itertext()).split()), markdown]
    for row in shown:
        text = format_value(row.value, row.unit, signed=row.baseline is not None)
        low, high = (format_value(bound, row.unit, signed=row.baseline is not None) for bound in (row.low, row.high))
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
    for title in ("Recall", "Text", "Long contexts", "In-context learning", "Other measures", "Paired differences"):
        found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
        for table in found.iter("table"):
            heads = ["".join(cell.itertext()) for cell in table.find("thead").iter("th")]
            if "task" in heads:  # of those that were not run
                continue
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
    needles = section(html, "Long contexts")
    assert "Passkey, mamba2: answer NLL by length and depth" in needles
    assert "Passkey, gla: answer NLL by length and depth" not in needles
    assert "past the training length" in section(html, "Text")


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


def test_seeds_that_were_not_combined_show_their_range(tmp_path):
    fabricated_run(tmp_path, seeds=(0, 1, 2), models=("gla",), without=("passkey", "nll_by_position"))
    rewrite(tmp_path, lambda row: None if row.seed is None and row.suite != "run" else row)
    rewrite(tmp_path, lambda row: replace(row, value=row.value + row.seed / 100) if row.suite == "mqar" else row)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "0.700 0.690 to 0.710 (seeds)" in section(html, "Recall").replace("0.7000.690", "0.700 0.690")
    assert "no interval" in section(html, "Verdict")


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


def evaluated(folder, arm):
    """What `statex eval` writes of one model, from a made-up run."""
    rows = read_results(fabricated_run(folder.with_name(f"{folder.name}-run"), models=("gla",)) / "results.jsonl")
    kept = [
        row for row in rows if row.arm == arm and row.baseline is None and row.suite not in ("state", "diagnostics")
    ]
    folder.mkdir()
    write_results(folder / "results.jsonl", [replace(row, model="a/path", arm="", seed=None) for row in kept])
    (folder / "evaluation.json").write_text(json.dumps({"evaluation": {"batch_size": 3}}))
    return folder


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
    words = section(html, "Long contexts")
    assert "accuracy, keys 2 by length and depth (n = 50" in words
    assert "accuracy, keys 4 by length and depth (n = 50" in words
    drawing = next((tmp_path / "figures").glob("niah_multikey-accuracy-gla-keys-2-lpt.svg")).read_text(encoding="utf-8")
    assert ">64K<" in drawing
    assert ">not run<" in drawing


def test_diagnosis_shows_each_failure_with_its_figure(whole):
    _, html, markdown = whole
    words = section(html, "Diagnosis")
    assert "Text lost, reinit. Text NLL changed by +0.062 against lpt" in words
    assert "Recall flat, reinit. Recall at 32 pairs changed by −0.020" in words
    assert "not used. Zeroing the new entries changes recall by" in words
    assert "−0.210 [−0.240, −0.180]: they are in use, whether or not they raise recall." in words
    assert "reinit: the new entries, 75 % of the state, hold" in words
    assert "zeroing them changes text NLL by +0.050 nats [+0.040, +0.060] (n = 32 documents)" in words
    assert "recall at 32 pairs by −0.210 [−0.240, −0.180] (n = 64 sequences)" in words
    assert "Not moved at all: layer 2: layers.2.q_proj.weight." in words
    assert "Smallest failure this run could detect (80 % power): a rise of text NLL by 0.013 nats (n = 100" in words
    assert "and a change of recall by 0.064 (n = 200 sequences)." in words
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == "Diagnosis")
    labels = [drawing.get("alt") for drawing in found.iter("img")]
    assert "gla: text NLL, nats, minus lpt: base +0.140 [+0.131, +0.149]; reinit +0.062 [+0.053, +0.071]" in labels[1]
    assert any(
        label.startswith("gla: effective rank of the state against layer. reinit: 3.25 to 5.5 at 0") for label in labels
    )
    assert any(
        label.startswith("gla: energy in the new entries against step. reinit: 0.1 at 0, 0.225 at 50, 0.35 at 100")
        for label in labels
    )
    assert any(label.startswith("gla: effective rank of the state against step. reinit: 5 at 0") for label in labels)
    ids = {one.get("id") for one in tree(html).iter()}
    links = [one.get("href") for one in tree(html).iter("a")]
    assert {"#r1-text", "#r1-recall", "#r1-diagnosis"} <= set(links)
    assert all(link.removeprefix("#") in ids for link in links)
    assert "[Recall](#recall)" in markdown
    assert "signs of failure: text lost (reinit)" in section(html, "Verdict")


def test_what_is_undecided_is_no_sign_of_failure_and_says_what_would_decide_it(tmp_path):
    """Also where a sign was stored under older rules."""
    fabricated_run(tmp_path, models=("mamba2",), without=("passkey", "cost"))
    power = {"detectable": 2.0, "items": None, "seeds": 21}

    def change(row):
        at = row.slice.get("num_pairs") == 32 and row.arm == "reinit" and row.baseline
        return replace(row, value=0.02, low=-0.3, high=0.34, details={"power": power}) if at else row

    rewrite(tmp_path, change)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    words = section(html, "Diagnosis")
    assert "Undecided, reinit. Recall changed by +0.02 [−0.30, +0.34]: a gain is neither established nor ruled" in words
    assert "To establish a difference of this size: more seeds needed: 21." in words
    assert "a change of recall by more than is possible" in words
    assert "Recall flat" not in words
    assert "? +0.02 [−0.30, +0.34]" in section(html, "Verdict")
    assert "Undecided: recall above lpt, mamba2 reinit." in section(html, "Aims")
    assert "more seeds needed: 21" in section(html, "Aims")


def test_without_failures_it_is_said_how_small_a_loss_would_have_been_seen(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "cost"))
    rewrite(tmp_path, lambda row: None if row.metric == "text_lost" else row)
    words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Diagnosis")
    assert "No sign of failure is established in reinit and preserve." in words
    assert "Smallest failure this run could detect (80 % power): a rise of text NLL by 0.013 nats" in words


def test_a_common_sense_task_that_was_lost_is_drawn(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "cost"))
    common = {"model": "gla", "arm": "reinit", "seed": 0, "baseline": "lpt", "low": -0.08, "high": -0.02, "n": 1838}
    lost = [
        Result("piqa", "acc", -0.05, "fraction", **common),
        Result(
            "diagnostics", "text_lost", -0.05, "fraction", slice={"of": "piqa acc"}, note="Accuracy fell.", **common
        ),
    ]
    write_results(tmp_path / "results.jsonl", [*read_results(tmp_path / "results.jsonl"), *lost])
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    words = section(html, "Diagnosis")
    assert "Text NLL changed by +0.062" in words  # both stand
    assert "Text lost, reinit. Accuracy fell." in words
    assert "gla: piqa acc minus lpt: reinit −0.050 [−0.080, −0.020]" in section_labels(html, "Diagnosis")


def test_a_run_that_was_not_diagnosed_says_how_it_can_be(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("diagnostics", "passkey", "cost"))
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Not run. statex run with the same recipe adds it" in section(html, "Diagnosis")
    assert "signs of failure" not in section(html, "Verdict")


def test_needles_that_no_arm_finds_are_one_sentence(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("mqar", "ar_hits", "nll_by_position", "diagnostics", "cost"))
    found = ("passkey", "accuracy")
    rewrite(
        tmp_path, lambda row: replace(row, value=0.0, low=0.0, high=0.037) if (row.suite, row.metric) == found else row
    )
    write_report(tmp_path)
    words = section((tmp_path / "report.html").read_text(encoding="utf-8"), "Long contexts")
    assert "gla: no arm finds anything in passkey: accuracy is 0 at every length. With 100 questions" in words
    assert "an accuracy below 0.037 is not excluded." in words
    assert list((tmp_path / "figures").glob("passkey-answer_nll-*"))
    assert not list((tmp_path / "figures").glob("passkey-accuracy-*"))


def test_established_differences_of_needle_cells_have_a_border(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("mqar", "ar_hits", "nll_by_position", "diagnostics", "cost"))
    where, common = {"length": 256, "depth": 0.1}, {"model": "gla", "arm": "reinit", "seed": 0, "baseline": "lpt"}
    plain = write_report(tmp_path) and (tmp_path / "figures/passkey-accuracy-gla-reinit-minus-lpt.svg").read_text()
    cell = Result("passkey", "accuracy", 0.2, "fraction", 0.1, 0.3, 20, where, **common)
    write_results(tmp_path / "results.jsonl", [*read_results(tmp_path / "results.jsonl"), cell])
    write_report(tmp_path)
    drawing = (tmp_path / "figures/passkey-accuracy-gla-reinit-minus-lpt.svg").read_text()
    assert drawing.count("fill: none") == plain.count("fill: none") + 1
    assert "+0.200 [+0.100, +0.300]" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_shots_have_their_chance_and_their_zero(whole):
    folder, html, _ = whole
    names = [path.name for path in (folder / "figures").glob("symbol_icl-*")]
    assert sorted(names) == [
        f"symbol_icl-{model}-accuracy-{kind}-symbols.svg" for model in ("gla", "mamba2") for kind in ("seen", "unseen")
    ]
    drawing = (folder / "figures" / names[0]).read_text(encoding="utf-8")
    assert ">guessing<" in drawing
    assert re.findall(r">(\d+)</text>", drawing)[:4] == ["0", "4", "16", "64"]
    assert "base: 0.2" in section_labels(html, "In-context learning")


def section_labels(html, title):
    """The text alternatives of a section's drawings."""
    found = next(one for one in tree(html).iter("section") if one.find("h2").text == title)
    return " ".join(drawing.get("alt") for drawing in found.iter("img"))


def test_tasks_without_data_are_named_with_what_would_fetch_it(whole):
    _, html, markdown = whole
    assert "piqa: acc" in section(html, "Other measures")
    assert "hf download hazyresearch/based-swde" in section(html, "Not run")
    assert "| swde | no data on this machine | hf download hazyresearch/based-swde |" in markdown


def test_tasks_that_an_evaluation_lacked_are_named_too(tmp_path):
    task = {"task": "swde", "reason": "no data", "command": "fetch it"}
    folder = evaluated(tmp_path / "mine", "reinit")
    (folder / "not_run.json").write_text(json.dumps([task]))
    page = write_report(folder)[1].read_text(encoding="utf-8")
    assert "| swde | no data | fetch it |" in page
    write_results(folder / "results.jsonl", [])  # as where nothing at all could be run
    assert "| swde | no data | fetch it |" in write_report(folder)[1].read_text(encoding="utf-8")


def test_numbers_on_an_axis_do_not_run_into_one_another():
    from statex.reporting.render.figures import Dot, DotChart, dot_chart

    def ticks(value):
        printed = f"{value:,.0f} (seeds 100,000 to 200,000)"
        dots = [Dot(name, "lpt", 0, value * place, None, printed) for place, name in enumerate(("one arm", "another"))]
        return re.findall(r">(-?[0-9.]+)</text>", dot_chart(DotChart("title", dots, False, True)))

    assert len(ticks(3)) > 3
    assert 2 <= len(ticks(150_000)) <= 3


def test_a_group_stands_for_its_suites(tmp_path):
    fabricated_run(tmp_path, models=("gla",))
    recipe = tmp_path / "recipe.toml"
    names = 'suites = ["mqar", "passkey", "ar_hits", "nll_by_position"]'
    assert names in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(names, 'suites = ["offline"]'))
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Needle in text, UUID (S-NIAH-3) gla: not run." in section(html, "Long contexts")
    assert "Not run." in section(html, "In-context learning")


def test_numbers_printed_in_drawings_are_not_cut(whole):
    folder, _, _ = whole
    drawing = (folder / "figures" / "diagnosis-text-gla.svg").read_text(encoding="utf-8")
    assert "+0.062 [+0.053, +0.071]" in drawing


def test_power_note_where_nothing_is_established(tmp_path):
    fabricated_run(tmp_path, models=("gla",), without=("passkey", "nll_by_position"))
    power = {"detectable": 0.2, "items": 4321, "seeds": None}

    def change(row):
        return replace(row, details={"power": power} | ({"items_needed": 7} if row.arm == "control" else {}))

    rewrite(tmp_path, lambda row: change(row) if row.baseline else row)
    words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Paired differences")
    assert "−0.020 [−0.065, +0.025], more items needed: 4,321" in words
    assert "[+0.225, +0.315], more" not in words
    for needed in ({"items": None, "seeds": 21}, {"items": 900, "seeds": 21}):
        power |= needed
        rewrite(tmp_path, lambda row: change(row) if row.baseline else row)
        words = section(write_report(tmp_path)[0].read_text(encoding="utf-8"), "Paired differences")
        with_items = ", with 900 items" if needed["items"] else " "
        assert f"−0.020 [−0.065, +0.025], more seeds needed: 21{with_items}" in words
