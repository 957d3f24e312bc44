"""Names of suites, groups and tasks, with lm-eval there or not."""

import sys

import pytest
from tiny_models import make_gla

from statex.errors import UserError
from statex.evaluation import Request, check_names, evaluate, measure_model
from statex.evaluation.records import Score
from statex.evaluation.summary import generic_suite
from statex.results.suites import HARNESS_GROUPS


@pytest.fixture
def without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails


def test_our_suites_need_no_lm_eval(without_lm_eval, tokenizer, evaluation, source):
    settings = evaluation.model_copy(update={"suites": ["mqar"]})
    check_names(["offline", "mqar"])
    measured = measure_model(make_gla(), tokenizer, Request(settings, text=source))
    assert measured.results == evaluate(make_gla(), tokenizer, Request(settings, text=source))
    assert measured.not_run == []


@pytest.mark.parametrize("name", [*HARNESS_GROUPS, "piqa", "lm_eval_niah_single_1"])
def test_a_group_without_lm_eval_names_the_remedy(without_lm_eval, name):
    with pytest.raises(UserError) as error:
        check_names(["mqar", name])
    assert (error.value.field, error.value.value) == ("evaluation.suites", name)
    assert error.value.remedy == "install it with pip install 'statex[eval]'"


def test_an_unknown_name_is_reported_before_anything_runs(without_lm_eval, tokenizer, evaluation, source, tmp_path):
    settings = evaluation.model_copy(update={"suites": ["mqar", "pass_key"]})
    with pytest.raises(UserError, match=r"'pass_key': is not a suite; known suites: mqar, .*; groups: offline, recall"):
        measure_model(make_gla(), tokenizer, Request(settings, text=source, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_only_what_lies_between_0_and_1_is_a_fraction():
    scores = [
        Score(str(place), str(place), {}, {"f1": value / 3, "points": value}) for place, value in enumerate((1.0, 3.0))
    ]
    assert generic_suite("task", scores).units == {"f1": "fraction", "points": ""}
