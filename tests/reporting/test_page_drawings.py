"""The drawings of a page: told apart without colour, their numbers legible, differences that are established marked."""

import re

from fabricated import fabricated_run
from pages import section_labels

from statex.reporting.page import write_report
from statex.results import Result, read_results, write_results


def test_arms_differ_without_colour(whole):
    folder, _, _ = whole
    drawing = (folder / "figures" / "recall-gla.svg").read_text(encoding="utf-8")
    uncoloured = re.sub(r"#[0-9a-f]{6}", "", drawing)
    dashes = set(re.findall(r"stroke-dasharray: [^;\"]*", uncoloured))
    assert len(dashes) >= 3  # and the arms with solid lines differ in their markers
    assert len(set(re.findall(r'<path id="m[^"]*" d="([^"]*)"', uncoloured))) >= 5


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
