"""A part of a recipe: which chains it has, and what names it must not have."""

from pathlib import Path

import pytest

from statex.errors import UserError
from statex.recipe import apply_override, parse_recipe
from statex.run import Chain, Selection, chains_of
from tiny_recipe import recipe_values


@pytest.fixture
def recipe():
    values = recipe_values("text/*.txt", Path("runs"))
    for override in ("seeds=[3,5]", 'arms.control.models=["mamba2"]'):
        apply_override(values, override)
    return parse_recipe(values)


ALL = ("lpt", "reinit", "preserve", "control")


def test_the_arms_of_a_chain_are_done_by_several_processes(recipe):
    start, arms = chains_of(recipe, Selection(models=["gla"], seeds=[5]))[0].parts()
    assert (start.arms, str(start)) == ((), "gla seed 5")
    assert [arm.arms for arm in arms] == [("lpt",), ("reinit",), ("preserve",)]
    assert str(arms[1]) == "gla seed 5 reinit"


@pytest.mark.parametrize(
    ("selection", "chains"),
    [
        (
            Selection(),
            [("gla", 3, ALL[:3]), ("gla", 5, ALL[:3]), ("mamba2", 3, ALL), ("mamba2", 5, ALL)],
        ),
        (Selection(models=["mamba2"], seeds=[5]), [("mamba2", 5, ALL)]),
        (Selection(arms=["control"]), [("mamba2", 3, ("control",)), ("mamba2", 5, ("control",))]),
        (Selection(["gla"], ["preserve", "lpt", "lpt"], [3]), [("gla", 3, ("lpt", "preserve"))]),
    ],
)
def test_what_a_selection_runs(recipe, selection, chains):
    assert chains_of(recipe, selection) == [Chain(*chain) for chain in chains]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(models=["x"]), "--model = 'x': is not one of this recipe; known: gla, mamba2."),
        (
            Selection(arms=["lpt", "x"]),
            "--arm = 'x': is not one of this recipe; known: lpt, reinit, preserve, control.",
        ),
        (Selection(seeds=[0]), "--seed = 0: is not one of this recipe; known: 3, 5."),
        (Selection(models=["gla"], arms=["lpt", "control"]), "--arm = 'control': is not run on gla; it is for mamba2."),
    ],
)
def test_names_that_the_recipe_does_not_have(recipe, selection, message):
    with pytest.raises(UserError) as caught:
        chains_of(recipe, selection)
    assert str(caught.value) == message
