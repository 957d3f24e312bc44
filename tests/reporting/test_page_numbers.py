"""The numbers of a page: those of the results, each with its n and interval, in tables, words and drawings."""

import re
from dataclasses import replace

from fabricated import VERSIONS, fabricated_run, rewrite
from pages import cells, section, tree

from statex.reporting.page import write_report
from statex.reporting.wording import format_value
from statex.results import Result, read_results, write_results


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


def test_one_seed_is_said_and_near_zero_accuracy_shows_answer_nll(tmp_path):
    html = write_report(fabricated_run(tmp_path))[0].read_text(encoding="utf-8")
    assert "One training seed (0): the intervals are over items only" in section(html, "Verdict")
    needles = section(html, "Long contexts")
    assert "Passkey, mamba2: answer NLL by length and depth" in needles
    assert "Passkey, gla: answer NLL by length and depth" not in needles
    assert "past the training length" in section(html, "Text")


def test_seeds_that_were_not_combined_show_their_range(tmp_path):
    fabricated_run(tmp_path, seeds=(0, 1, 2), models=("gla",), without=("passkey", "nll_by_position"))
    rewrite(tmp_path, lambda row: None if row.seed is None and row.suite != "run" else row)
    rewrite(tmp_path, lambda row: replace(row, value=row.value + row.seed / 100) if row.suite == "mqar" else row)
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "0.700 0.690 to 0.710 (seeds)" in section(html, "Recall").replace("0.7000.690", "0.700 0.690")
    assert "no interval" in section(html, "Verdict")


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
