"""The drawings of the page."""

import re
import xml.etree.ElementTree as ElementTree

from fabricated import fabricated_run
from markup import section, section_labels

from statex.reporting.page import write_report
from statex.results import Result, read_results, write_results


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


def test_numbers_on_an_axis_do_not_run_into_one_another():
    from statex.reporting.render.figures import Dot, DotChart, dot_chart

    def ticks(value):
        printed = f"{value:,.0f} (seeds 100,000 to 200,000)"
        dots = [Dot(name, "lpt", 0, value * place, None, printed) for place, name in enumerate(("one arm", "another"))]
        return re.findall(r">(-?[0-9.]+)</text>", dot_chart(DotChart("title", dots, False, True)))

    assert len(ticks(3)) > 3
    assert 2 <= len(ticks(150_000)) <= 3


def test_numbers_printed_in_drawings_are_not_cut(whole):
    folder, _, _ = whole
    drawing = (folder / "figures" / "diagnosis-text-gla.svg").read_text(encoding="utf-8")
    assert "+0.062 [+0.053, +0.071]" in drawing
