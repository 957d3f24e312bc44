"""Every recipe of the repository loads, and its models can be made and expanded as it says."""

from pathlib import Path

import pytest

from statex.data.tokenizer import train_tokenizer
from statex.evaluation.suites import find_suite
from statex.expansion.config import ExpansionConfig
from statex.expansion.plan import plan_expansion, plan_reinitialization, select_layers
from statex.families import family_of
from statex.models.scratch import make_config, make_model
from statex.recipe import Recipe, load_recipe, parse_recipe
from statex.run.cost import costs
from statex.settings import Data
from statex.training.arguments import training_arguments
from tiny_recipe import CONFIGS, data_values, write_text

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


PAPER = [path for path in RECIPES if path.stem.startswith("paper-")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """By model's name: a folder with as many layers as the paper's, and little else; `text`: some files."""
    folder = tmp_path_factory.mktemp("small")
    data = Data.model_validate(data_values(write_text(folder / "text")))
    tokenizer = train_tokenizer(data.text, data.tokenizer, data.recall)
    found = {"text": data.text.files}
    for name, family, layers in (("gla", "statex_gla", 24), ("mamba2", "mamba2", 48)):
        fields = CONFIGS[family] | {"num_hidden_layers": layers}
        make_model(family, fields, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_a_recipe_of_the_paper_dry_runs(path, small, tmp_path):
    values = load_recipe(path).model_dump(mode="json", exclude_none=True)
    for name in values["models"]:
        values["models"][name]["checkpoint"] = small[name]
    values["output"], values["data"]["text"] = str(tmp_path / "runs"), {"files": small["text"], "held_out": 0.3}
    values["training"] |= {"tokens_per_step": 128, "sequence_length": 32}
    values["evaluation"]["suites"] = []
    found = {each.arm: each for each in costs(parse_recipe(values))}
    assert list(found) == ["lpt", "statex", "preserve", "control"]
    assert {each.tokens for each in found.values()} == {20_000 * 128}
    assert found["control"].state == found["lpt"].state < found["statex"].state
    assert not (tmp_path / "runs").exists()
