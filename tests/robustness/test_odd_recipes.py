"""Odd recipes of every kind are accepted and run, or refused with nothing written; `long_run.py` tries thousands."""

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from recipes import odd_recipes, try_recipe

from statex.errors import UserError
from statex.recipe import load_recipe

SECONDS = 5.0
"""Of the processor, for one input."""


def limited(**changes: Any) -> settings:
    return settings(
        max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck), **changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def try_within_seconds(place, case) -> None:
    begin = time.process_time()
    try_recipe(place, case)
    assert time.process_time() - begin < SECONDS


@seed(0)
@limited(phases=[Phase.generate])
@given(case=odd_recipes())
def test_odd_recipes_of_a_fixed_seed(place, case):
    try_within_seconds(place, case)


@limited()
@given(case=odd_recipes())
def test_odd_recipes_of_any_seed(place, case):
    try_within_seconds(place, case)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet=st.sampled_from("a.=[]{}\"'#\n\0 1-\ufeff\u00e9"), max_size=30))
def test_any_text_is_a_recipe_an_override_or_refused(place, text):
    path = place / "any.toml"
    for content, overrides in ((text, []), ("", [text]), ("", [f"name={text}"])):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError):  # something is missing in all of them
            load_recipe(path, overrides)
