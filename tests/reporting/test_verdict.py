"""The rules of the verdict: success, failure, intervals with 0, and missing data."""

import math
import re
from dataclasses import replace

import pytest
from fabricated import fabricated_run, rewrite

from statex.reporting.page import write_report
from statex.reporting.run import read_run
from statex.reporting.terminal import summary
from statex.reporting.verdict import verdict

HARDEST = {"num_pairs": 32, "length": 128}


def recall_difference(folder, arm, value, low, high):
    """Set the paired difference of recall at the most pairs."""

    def change(row):
        at = row.suite == "mqar" and row.slice == HARDEST and row.baseline == "lpt" and row.arm == arm
        return replace(row, value=value, low=low, high=high) if at else row

    rewrite(folder, change)


def text_difference(folder, arms, value, low, high):
    def change(row):
        at = (row.suite, row.metric, row.baseline) == ("ar_hits", "nll", "lpt") and row.arm in arms
        return replace(row, value=value, low=low, high=high) if at else row

    rewrite(folder, change)


def judged(folder, model="gla"):
    one = verdict(read_run(folder), model)
    return one, {(aim.aim.split()[0], aim.arm): aim.outcome for aim in one.aims}


def test_success_is_stated_with_its_intervals(tmp_path):
    one, outcomes = judged(fabricated_run(tmp_path))
    assert set(outcomes.values()) == {"met"}
    assert "raised recall at 32 pairs over post-training alone (lpt) by" in one.sentence
    assert "+0.27 [+0.22, +0.31] (reinit)" in one.sentence
    assert "the control did not rise (−0.02 [−0.06, +0.03])" in one.sentence
    assert "+3.8 % [+3.2, +4.3] worse (reinit)" in one.sentence


def test_an_interval_with_zero_and_a_gain_in_it_is_undecided(tmp_path):
    recall_difference(fabricated_run(tmp_path), "reinit", 0.02, -0.01, 0.06)
    one, outcomes = judged(tmp_path)
    assert outcomes["recall", "reinit"] == "undecided"
    assert "undecided for +0.02 [−0.01, +0.06] (reinit)" in one.sentence


def test_no_gain_is_claimed_where_the_upper_bound_is_below_the_margin(tmp_path):
    recall_difference(fabricated_run(tmp_path), "reinit", 0.0, -0.03, 0.03)
    one, outcomes = judged(tmp_path)
    assert outcomes["recall", "reinit"] == "not met"
    assert "no gain of 0.05 or more for 0.00 [−0.03, +0.03] (reinit)" in one.sentence


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        ((-0.41, -1.00, 0.60), "undecided"),
        ((-0.03, -0.10, 0.03), "met"),
        ((-0.3, -0.4, -0.2), "met"),
        ((0.1, 0.02, 0.18), "not met"),
        ((0.02, -0.02, 0.06), "undecided"),
        ((0.1, None, None), "undecided"),
        ((math.nan, math.nan, math.nan), "undecided"),
    ],
)
def test_a_control_without_an_established_rise_is_undecided(tmp_path, difference, outcome):
    recall_difference(fabricated_run(tmp_path), "control", *difference)
    one, outcomes = judged(tmp_path)
    assert outcomes["control", "control"] == outcome
    assert ("whether the control rose too is undecided (" in one.sentence) == (outcome == "undecided")


def test_what_would_decide_an_aim_is_stated(tmp_path):
    recall_difference(fabricated_run(tmp_path), "reinit", 0.02, -0.2, 0.24)
    power = {"detectable": 0.3, "items": None, "seeds": 21}
    rewrite(tmp_path, lambda row: replace(row, details={"power": power}) if row.baseline else row)
    one, _ = judged(tmp_path)
    assert [aim.needed for aim in one.aims if aim.outcome == "undecided"] == ["more seeds needed: 21"]


def test_a_loss_of_recall_is_stated_plainly(tmp_path):
    fabricated_run(tmp_path)
    recall_difference(tmp_path, "reinit", -0.2, -0.25, -0.15)
    recall_difference(tmp_path, "preserve", -0.1, -0.15, -0.05)
    one, outcomes = judged(tmp_path)
    assert "expanding the state **lowered** recall at 32 pairs by −0.20 [−0.25, −0.15] (reinit) and" in one.sentence
    assert "the control did not rise (" in one.sentence
    assert outcomes["recall", "reinit"] == outcomes["recall", "preserve"] == "not met"


def test_no_arm_raised_recall(tmp_path):
    fabricated_run(tmp_path)
    recall_difference(tmp_path, "reinit", 0.01, -0.05, 0.07)
    recall_difference(tmp_path, "preserve", 0.02, -0.05, 0.08)
    expected = "whether expanding the state raised recall at 32 pairs over post-training alone (lpt) is undecided:"
    assert expected in judged(tmp_path)[0].sentence


def test_a_control_that_rises_takes_the_gain_from_the_state(tmp_path):
    recall_difference(fabricated_run(tmp_path), "control", 0.1, 0.05, 0.15)
    one, outcomes = judged(tmp_path)
    assert outcomes["control", "control"] == "not met"
    assert "the control **rose too** (+0.10 [+0.05, +0.15]), so a gain is not due to the state alone" in one.sentence


def test_without_control(tmp_path):
    one, outcomes = judged(fabricated_run(tmp_path, without=("control",)))
    assert outcomes["control", "control"] == "not run"
    assert "no control was run" in one.sentence


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        ((0.02, 0.01, 0.03), "met"),
        ((0.02, 0.01, 0.05), "undecided"),
        ((0.2, 0.19, 0.21), "not met"),
        ((0.02, None, None), "undecided"),
    ],
)
def test_text_must_stay_within_two_percent_with_its_interval(tmp_path, difference, outcome):
    text_difference(fabricated_run(tmp_path), ("reinit", "preserve"), *difference)
    _, outcomes = judged(tmp_path)
    found = [value for (aim, _), value in outcomes.items() if aim == "text"]
    assert found == [outcome]


def test_signs_of_failure_are_named(tmp_path):
    one, _ = judged(fabricated_run(tmp_path), "mamba2")
    signs = "signs of failure: text lost (reinit) and recall flat (reinit); see the [Diagnosis](#Diagnosis)."
    assert signs in one.reservations


def test_text_by_position_stands_in_for_missing_ar_hits(tmp_path):
    one, _ = judged(fabricated_run(tmp_path, without=("ar_hits",)))
    assert "text NLL is +3.7 %" in one.sentence


def test_missing_data_is_not_run_and_never_zero(tmp_path):
    one, outcomes = judged(fabricated_run(tmp_path, without=("mqar", "ar_hits", "nll_by_position")))
    assert set(outcomes.values()) == {"not run"}
    assert "recall was not run" in one.sentence
    assert "text NLL was not run" in one.sentence


def test_a_missing_arm_is_named(tmp_path):
    one, outcomes = judged(fabricated_run(tmp_path, without=("preserve",)))
    assert outcomes["recall", "preserve"] == "not run"
    assert "not run: preserve" in one.sentence
    assert "not run for preserve" in one.sentence


def without_arms(folder, *arms):
    """Take arms out of a run: out of its recipe, and what was measured of them."""
    recipe = (folder / "recipe.toml").read_text()
    for arm in arms:
        begin = recipe.index(f"[arms.{arm}]")
        recipe = recipe[:begin] + recipe[recipe.index("[", begin + 1) :]
    (folder / "recipe.toml").write_text(recipe)
    rewrite(folder, lambda row: None if row.arm in arms else row)


def for_other_models(folder, *arms):
    """Arms that are run on mamba2 alone."""
    recipe = (folder / "recipe.toml").read_text()
    for arm in arms:
        recipe = recipe.replace(f"[arms.{arm}]", f'[arms.{arm}]\nmodels = ["mamba2"]')
    (folder / "recipe.toml").write_text(recipe)
    rewrite(folder, lambda row: None if (row.model, row.arm in arms) == ("gla", True) else row)


@pytest.mark.parametrize("measured", [True, False])
def test_a_model_with_reference_arms_alone_has_no_aims(tmp_path, measured):
    fabricated_run(tmp_path, without=() if measured else ("mqar", "ar_hits", "nll_by_position"))
    for_other_models(tmp_path, "reinit", "preserve", "control")
    one, outcomes = judged(tmp_path)
    assert one.sentence == "**gla**: only reference arms were run (base and lpt): no state was expanded."
    assert not outcomes
    assert any(aim.aim.startswith("text NLL within") for aim in judged(tmp_path, "mamba2")[0].aims)
    words = " ".join(str(part) for part in summary(tmp_path))
    assert "aims are met" in words
    assert not re.search(r"one arm is enough\), gla", words)


def test_a_run_of_reference_arms_alone_counts_no_aims(tmp_path):
    without_arms(fabricated_run(tmp_path), "reinit", "preserve", "control")
    assert not any("aims are met" in str(part) for part in summary(tmp_path))
    _, markdown = write_report(tmp_path)
    assert "only reference arms were run" in markdown.read_text()
    assert "## Aims" not in markdown.read_text()


def test_a_control_without_an_expanded_arm_has_its_own_aim_alone(tmp_path):
    for_other_models(fabricated_run(tmp_path), "reinit", "preserve")
    one, outcomes = judged(tmp_path)
    assert set(outcomes) == {("control", "control")}
    assert one.sentence == "**gla**: no expanded arm was run; the control did not rise (−0.02 [−0.06, +0.03])."


def test_nothing_to_compare_with(tmp_path):
    fabricated_run(tmp_path)
    text = (tmp_path / "recipe.toml").read_text().replace('[arms.lpt]\nkind = "lpt"\n', "")
    (tmp_path / "recipe.toml").write_text(text)
    rewrite(tmp_path, lambda row: None if row.arm == "lpt" or row.baseline else row)
    one, outcomes = judged(tmp_path)
    assert "nothing to compare with" in one.sentence
    assert not outcomes


def test_no_interval_and_nan_claim_nothing(tmp_path):
    recall_difference(fabricated_run(tmp_path), "reinit", 0.3, None, None)
    text_difference(tmp_path, ("preserve",), math.nan, math.nan, math.nan)
    one, outcomes = judged(tmp_path)
    assert outcomes["recall", "reinit"] == "undecided"
    assert "+0.30, no interval (reinit)" in one.sentence
    assert "not a number (preserve)" in one.sentence


def test_recall_that_was_never_learnt_is_a_reservation(tmp_path):
    def change(row):
        at = row.suite == "mqar" and row.slice["num_pairs"] == 4 and row.arm == "base" and row.baseline is None
        return replace(row, value=0.31) if at else row

    rewrite(fabricated_run(tmp_path), change)
    one, _ = judged(tmp_path)
    assert any("base reaches only 0.310 at 4 pairs (n = 200)" in remark for remark in one.reservations)
