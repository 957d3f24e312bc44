"""Every recipe of the repository loads, and its models can be made and expanded as it says."""

from pathlib import Path

import pytest

from statex.evaluation.suites import find_suite
from statex.expansion.config import ExpansionConfig
from statex.expansion.plan import plan_expansion, plan_reinitialization, select_layers
from statex.families import family_of
from statex.models.scratch import make_config
from statex.recipe import Recipe, load_recipe
from statex.training.arguments import training_arguments

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


class Vocabulary:
    """As much of a tokenizer as a configuration asks for."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return 512


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_holds_together(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for name in recipe.evaluation.suites:
        find_suite(name)
    for name, model in recipe.models.items():
        if model.pretraining is not None:
            training_arguments(model.pretraining, tmp_path, seed=0)
        for arm in recipe.arms_of(name):
            training_arguments(recipe.arm_training(arm), tmp_path, seed=0)
        if model.family is not None:
            check_plans(recipe, name, make_config(model.family, model.config, Vocabulary()))


def check_plans(recipe: Recipe, name: str, config) -> None:
    for arm in recipe.arms_of(name).values():
        expansion = arm.expansion or ExpansionConfig()
        if arm.kind == "statex":
            assert plan_expansion(config, expansion).layers
        elif arm.kind == "control":
            layers = select_layers(family_of(config).recurrent_layers(config), expansion)
            assert plan_reinitialization(config, layers).layers


def test_there_are_recipes():
    assert "demo.toml" in {path.name for path in RECIPES}


def test_the_study_is_the_demo_with_five_seeds():
    demo, study = (load_recipe(path) for path in RECIPES if path.stem in ("demo", "cpu-study"))
    demo, study = sorted((demo, study), key=lambda recipe: len(recipe.seeds))
    assert (demo.seeds, study.seeds) == ([0], [0, 1, 2, 3, 4])
    assert demo.model_dump(exclude={"name", "seeds"}) == study.model_dump(exclude={"name", "seeds"})
