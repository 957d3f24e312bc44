"""The numbers on the page are those of the results, with n and interval, and what is missing is said."""

import json
import re
from dataclasses import replace

from fabricated import evaluated, fabricated_run, rewrite
from markup import section, section_labels, tree

from statex.reporting.page import write_report
from statex.reporting.wording import format_value
from statex.results import read_results, write_results


def test_numbers_equal_the_results(whole):
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


def test_results_without_any_number(tmp_path):
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


def test_a_group_stands_for_its_suites(tmp_path):
    fabricated_run(tmp_path, models=("gla",))
    recipe = tmp_path / "recipe.toml"
    names = 'suites = ["mqar", "passkey", "ar_hits", "nll_by_position"]'
    assert names in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(names, 'suites = ["offline"]'))
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Needle in text, UUID (S-NIAH-3) gla: not run." in section(html, "Long contexts")
    assert "Not run." in section(html, "In-context learning")
