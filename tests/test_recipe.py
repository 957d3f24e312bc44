"""Recipes: what they may say, how they are overridden, and what an error tells."""

from pathlib import Path

import pytest
import tomli_w

from statex.errors import UserError
from statex.recipe import Recipe, Training, Weights, apply_override, evaluation_sections, load_recipe, parse_recipe
from tiny_recipe import recipe_values, write_recipe


@pytest.fixture
def values() -> dict:
    return recipe_values("text/*.txt", Path("runs"))


def changed(values: dict, *overrides: str) -> Recipe:
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values)


def test_what_a_recipe_leaves_out_is_the_paper_s():
    training = Training()
    assert (training.steps, training.tokens_per_step, training.sequence_length) == (20_000, 524_288, 65_536)
    assert (training.learning_rate, training.betas, training.weight_decay) == (3e-4, (0.9, 0.95), 0.1)
    assert (training.warmup_steps, training.schedule, training.max_grad_norm) == (1000, "cosine", 1.0)
    assert (training.fresh_learning_rate_multiplier, training.min_learning_rate_ratio) == (1.0, 0.0)


def test_a_recipe_written_and_read_again_is_the_same(values, tmp_path):
    recipe = parse_recipe(values)
    path = write_recipe(tmp_path / "recipe.toml", recipe.model_dump(mode="json", exclude_none=True))
    assert load_recipe(path) == recipe.model_copy(update={"data": load_recipe(path).data})
    absolute = load_recipe(path)
    assert absolute.data.text.files == [str(tmp_path / "text/*.txt")]
    path.write_text(tomli_w.dumps(absolute.model_dump(mode="json", exclude_none=True)))
    assert load_recipe(path) == absolute


def test_the_values_given_are_left_alone(values):
    before = recipe_values("text/*.txt", Path("runs"))
    parse_recipe(values, relative_to=Path("/somewhere"))
    assert values == before


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.steps=7", lambda recipe: recipe.training.steps == 7),
        ("training.learning_rate=2e-3", lambda recipe: recipe.training.learning_rate == 2e-3),
        ("seeds=[0,1,2]", lambda recipe: recipe.seeds == [0, 1, 2]),
        ("training.schedule=wsd", lambda recipe: recipe.training.schedule == "wsd"),
        ('training.schedule="wsd"', lambda recipe: recipe.training.schedule == "wsd"),
        ("name=other", lambda recipe: recipe.folder == Path("runs/other")),
        ("evaluation.mqar.num_pairs=[8]", lambda recipe: recipe.evaluation.mqar.num_pairs == [8]),
        ("arms.lpt.training.steps=5", lambda recipe: recipe.arm_training("lpt").steps == 5),
        ("arms.reinit.expansion={ layers = [1] }", lambda recipe: recipe.arms["reinit"].expansion.layers == [1]),
        ("data.text.held_out=0.5", lambda recipe: recipe.data.text.held_out == 0.5),
        ("training.trainer.fsdp=full_shard", lambda recipe: recipe.training.trainer == {"fsdp": "full_shard"}),
    ],
)
def test_overrides(values, override, read):
    assert read(changed(values, override))


def test_the_last_override_counts(values):
    assert changed(values, "training.steps=7", "training.steps=8").training.steps == 8


def test_an_arm_changes_its_own_training_only(values):
    recipe = changed(values, "arms.reinit.training={ learning_rate = 0.5, weights = { mqar = 1.0 } }")
    assert recipe.arm_training("reinit").learning_rate == 0.5
    assert recipe.arm_training("reinit").weights.mqar == 1
    assert recipe.arm_training("reinit").steps == recipe.training.steps
    assert recipe.arm_training("lpt") == recipe.training


def test_arms_of_some_models(values):
    recipe = changed(values, 'arms.preserve.models=["gla"]')
    assert list(recipe.arms_of("gla")) == ["lpt", "reinit", "preserve", "control"]
    assert list(recipe.arms_of("mamba2")) == ["lpt", "reinit", "control"]


MISTAKES = {
    "unknown key": ("training.stepz=5", "training.stepz = 5: is not a known key; remove it or correct its spelling."),
    "unknown section": ("optimizer.lr=1", "optimizer = {'lr': 1}: is not a known key; remove it"),
    "wrong type": ("training.steps=many", "training.steps = 'many': Input should be a valid integer"),
    "out of range": ("training.learning_rate=0", "training.learning_rate = 0: Input should be greater than 0"),
    "of a list": ("seeds=[0,x]", "seeds = '[0,x]': Input should be a valid list"),
    "in a list": ('seeds=[0,"x"]', "seeds.1 = 'x': Input should be a valid integer"),
    "negative seed": ("seeds=[-1]", "seeds.0 = -1: Input should be greater than or equal to 0"),
    "seed twice": ("seeds=[1,1]", "seeds = [1, 1]: has a seed twice; list each seed once."),
    "one of several": ("training.schedule=linear", "training.schedule = 'linear': Input should be 'cosine' or 'wsd'"),
    "beta": ("training.betas=[0.9,1.5]", "training.betas.1 = 1.5: Input should be less than 1"),
    "no name for a folder": ("name=a/b", "name = 'a/b': String should match pattern"),
    "model's name": ("models.a/b.family=mamba2", "models.a/b.[key] = 'a/b': String should match pattern"),
    "taken name": (
        "arms.pretrained.kind=lpt",
        "arms = 'pretrained': is the name of another file or folder of a run; give",
    ),
    "seed of 33 bits": ("seeds=[4294967296]", "seeds.0 = 4294967296: is out of range: its absolute value"),
    "infinite": (
        "training.learning_rate=inf",
        "training.learning_rate = inf: is not a finite number; give a finite one.",
    ),
    "infinite weight": ("training.weights.text=inf", "training.weights.text = inf: is not a finite number"),
    "no number": ("models.gla.config.norm_eps=nan", "models.gla.config.norm_eps = nan: is not a finite number"),
    "in an arm": (
        "arms.lpt.training={ learning_rate = -inf }",
        "arms.lpt.training.learning_rate = -inf: is not a",
    ),
    "in a list of a dict": ("training.trainer.x=[[1.0, nan]]", "training.trainer.x.0.1 = nan: is not a finite number"),
    "too many tokens": ("training.tokens_per_step=32e12", "training.tokens_per_step = 32000000000000.0: is out of"),
    "too many tokens a step": ("training.tokens_per_step=3200000000", "Input should be less than or equal to 67108864"),
    "too many items": (
        "evaluation.mqar.num_items=1000000000000",
        "evaluation.mqar.num_items = 1000000000000: is out of range",
    ),
    "too many items at once": ("evaluation.mqar.num_items=100000000", "do not fit into memory together; give at most"),
    "too many keys": ("data.recall.num_keys=100000000", "data.recall.num_keys = 100000000: Input should be less than"),
    "too long": ("evaluation.passkey.lengths=[100000000]", "evaluation.passkey.lengths.0 = 100000000: Input should be"),
    "rank of 64 bits": ("arms.preserve.expansion.rank=9223372036854775808", "rank = 9223372036854775808: is out of"),
    "30 digits": (
        "models.gla.config.num_hidden_layers=1" + "0" * 30,
        "num_hidden_layers = 1000000000000000000000000000000",
    ),
    "5000 hexadecimal digits": ("seeds=[0x" + "f" * 5000 + "]", "seeds.0 = <int, too long to show>: is out of range"),
    "100 brackets": (
        "training.trainer.x=" + "[" * 100 + "]" * 100,
        "training.trainer.x = '...': is nested deeper than",
    ),
    "5000 sections": (".".join("a" * 1500) + "=1", "a.a.a = '...': is nested deeper than 32; flatten it."),
    "decay above 1": ("training.weight_decay=1e308", "training.weight_decay = 1e+308: is out of range"),
    "decay of all": (
        "training.weight_decay=100",
        "training.weight_decay = 100.0: times learning_rate = 0.01 is 1 or more",
    ),
    "NUL": (
        'output="a\\u0000b"',
        "output = 'a\\x00b': has an invalid character (NUL, or half of a surrogate pair); remove",
    ),
    "date": ("models.gla.config.x=1979-05-27", "is a date or time, which no key takes; put it in quotation marks"),
    "hub without a name": ('data.text.hub=""', "data.text.hub = '': String should have at least 1 character"),
    "checkpoint without a name": ('models.x.checkpoint=""', "models.x.checkpoint = '': String should have at least 1"),
    "long name": (f"name={'a' * 101}", "String should have at most 100 characters"),
    "two lines": ("training.steps=9\nname=other", "has more than one line; give --set once for each key."),
    "two lines of text": ("name=a\nb", "--set = 'name=a\\nb': has more than one line; give --set once for each key."),
    "steps": (
        "training.tokens_per_step=100",
        "training.tokens_per_step = 100: is not a multiple of sequence_length = 32",
    ),
    "warm-up": (
        "training.warmup_steps=4",
        "training.warmup_steps = 4: leaves no steps after the warm-up: steps = 4; shorten",
    ),
    "decay of cosine": ("training.decay_steps=1", 'training.decay_steps = 1: does not go with schedule = "cosine"'),
    "weights": ("training.weights={ text = 0.0 }", "training.weights = {'text': 0.0}: all weights are 0; give"),
    "recall": ("data.recall.shapes=[[16,5]]", "data.recall.shapes = [16, 5]: has no pairs, or more than num_keys"),
    "no shots": (
        "evaluation.symbol_icl.shots=[]",
        "evaluation.symbol_icl.shots = []: List should have at least 1 item",
    ),
    "length of 0": (
        "evaluation.passkey.lengths=[0]",
        "evaluation.passkey.lengths.0 = 0: Input should be greater than or equal to 1",
    ),
    "pairs": ("evaluation.mqar.num_pairs=[9]", "evaluation.mqar.num_pairs = 9: does not fit num_keys and num_values"),
    "two sources": ("data.text.hub=x", "needs exactly one of hub, files and standard_library; give one of them."),
    "two origins": ("models.gla.checkpoint=x", "models.gla.family = 'statex_gla': does not go with a checkpoint; give"),
    "no origin": ("models.x={}", "models.x.checkpoint = None: and family are both missing; give one of them."),
    "kind": ("arms.lpt.kind=sft", "arms.lpt.kind = 'sft': Input should be 'base', 'lpt', 'statex' or 'control'"),
    "no expansion": ("arms.lpt.kind=statex", 'arms.lpt.expansion = None: is missing in an arm of kind "statex"; say'),
    "an expansion": ("arms.reinit.kind=lpt", 'does not go with kind = "lpt"; remove it or use kind = "statex".'),
    "expansion's seed": (
        "arms.reinit.expansion.seed=3",
        "arms.reinit.expansion.seed = 3: is set by the run; remove it",
    ),
    "expansion's value": ("arms.reinit.expansion.every=0", "arms.reinit.expansion.every = 0: Input should be greater"),
    "two selections": ("arms.reinit.expansion.layers=[0]", "layers and every exclude one another; give one of them."),
    "unknown model": (
        'arms.lpt.models=["x"]',
        "arms.lpt.models = 'x': is not a model of this recipe; known models: gla, ",
    ),
    "arm's key": ("arms.lpt.training.stepz=1", "arms.lpt.training.stepz = 1: is not a known key; remove it or"),
    "arm's value": (
        "arms.lpt.training.steps=1",
        "arms.lpt.training.warmup_steps = 1: leaves no steps after the warm-up: steps = 1",
    ),
    "arm with nothing to train alone": (
        "training.train_only_expanded=true",
        'arms.lpt.training.train_only_expanded = True: an arm of kind "lpt" has no expanded layers; set it false',
    ),
    "nothing to train alone": (
        "models.gla.pretraining.train_only_expanded=true",
        "models.gla.pretraining.train_only_expanded = True: nothing is expanded yet in pre-training; remove it.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_names_field_value_and_remedy(values, mistake):
    override, message = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        changed(values, override)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["models", "arms"])
@pytest.mark.parametrize("name", ["recipe.toml", "results.jsonl", "report.html", "Report.md", "figures"])
def test_names_of_a_run_s_own_files_are_reserved(values, section, name):
    values[section][name] = next(iter(values[section].values()))
    with pytest.raises(UserError, match=f"{section} = '{name}': is the name of another file or folder of a run"):
        parse_recipe(values)


@pytest.mark.parametrize("text", ["[1,\n 2]", '"""\na\nb"""', r'"a\nb"'])
def test_a_value_of_several_lines_is_one_value(values, text):
    apply_override(values, f"training.trainer.x={text}")
    assert values["training"]["trainer"]["x"] in ([1, 2], "a\nb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = " + "9" * 5000, "Exceeds the limit"), ("x = " + "[" * 3000 + "]" * 3000, "is not valid TOML"),
        ("x = " + "{a=" * 3000 + "1" + "}" * 3000, "is not valid TOML"),
        (".".join("a" * 2000) + " = 1", "is nested deeper"),
        ("name = 'a\0b'", "is not valid TOML"), ("\ufeffname = 'a'", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_file_of_any_text_is_a_recipe_or_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(tmp_path / "a.toml")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (("name",), "name = None: is missing; add it."),
        (("models",), "models = None: is missing; add it."),
        (("arms", "lpt", "kind"), "arms.lpt.kind = None: is missing; add it."),
    ],
)
def test_what_is_missing_is_named(values, remove, message):
    section = values
    for key in remove[:-1]:
        section = section[key]
    del section[remove[-1]]
    with pytest.raises(UserError) as caught:
        parse_recipe(values)
    assert message in str(caught.value)


def test_a_base_arm_is_not_trained(values):
    values["arms"]["base"] = {"kind": "base", "training": {"steps": 9}}
    with pytest.raises(UserError, match=r"arms.base.training = .*is evaluated only; remove it"):
        parse_recipe(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set = 'steps': is not of the form section.key=value; write for example seeds=[0,1,2]."),
        ("=3", "--set = '=3': is not of the form"),
        ("seeds=[" + "9" * 5000 + "]", "has a value that is not valid TOML (Exceeds the limit (4300 digits)"),
        ("seeds=" + "[" * 3000 + "]" * 3000, "has a value that is not valid TOML ("),
        ("name.first=3", "name is not a section; name a key inside a section."),
        ("training.steps.of=3", "steps is not a section"),
    ],
)
def test_overrides_that_are_malformed(values, override, message):
    with pytest.raises(UserError) as caught:
        changed(values, override)
    assert message in str(caught.value)


def test_files_that_are_not_recipes(tmp_path):
    with pytest.raises(UserError, match="there is no such file; give the path of a TOML recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("name = \n")
    with pytest.raises(UserError, match=r"is not valid TOML \(Invalid value \(at line 1, column 8\)\); correct"):
        load_recipe(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(UserError, match=r"is not valid TOML .*can't decode byte"):
        load_recipe(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_text("name = 2024-01-01\n")
    with pytest.raises(UserError, match=r"name = .*2024.*: is a date or time, which no key takes"):
        load_recipe(tmp_path / "c.toml")


def test_sections_of_an_evaluation_without_a_recipe():
    sections = evaluation_sections(["evaluation.mqar.num_items=5", "data.seed=3"], suites=["mqar"])
    assert sections.evaluation.mqar.num_items == 5
    assert sections.evaluation.suites == ["mqar"]
    assert sections.data.seed == 3
    with pytest.raises(UserError, match=r"training = .*: is not a known key"):
        evaluation_sections(["training.steps=5"], suites=["mqar"])


def test_a_recipe_that_extends_another_changes_what_it_says(values, tmp_path):
    base = tmp_path / "base" / "base.toml"
    base.parent.mkdir()
    write_recipe(base, values)
    middle = write_recipe(tmp_path / "middle.toml", {"extends": "base/base.toml", "training": {"weights": {"text": 1}}})
    changes = {
        "extends": middle.name, "name": "other", "seeds": [1, 2], "models": {"gla": {"config": {"num_heads": 1}}},
        "evaluation": {"harness": {"data": "sets"}}, "arms": {"base": {"kind": "base"}},
    }  # fmt: skip
    recipe = load_recipe(write_recipe(tmp_path / "top.toml", changes), ["training.steps=9"])
    assert (recipe.name, recipe.seeds, recipe.training.steps) == ("other", [1, 2], 9)
    assert recipe.training.weights == Weights(text=1, mqar=0.5)
    before = values["models"]["gla"]["config"]
    assert recipe.models["gla"].config == before | {"num_heads": 1}
    assert recipe.models["mamba2"].config == values["models"]["mamba2"]["config"]
    assert list(recipe.arms) == [*values["arms"], "base"]
    assert recipe.data.text.files == [str(base.parent / "text/*.txt")]  # each file's paths are seen from its own folder
    assert recipe.evaluation.harness.data == str(tmp_path / "sets")
    assert "extends" not in recipe.model_dump()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'extends = "none.toml"'}, "extends = 'none.toml': there is no such file beside"),
        ({"a": 'extends = "."'}, "extends = '.': there is no such file beside"),
        ({"a": "extends = 3"}, "extends = 3: is not a path; give the path of another recipe, relative to this one."),
        ({"a": 'extends = "a.toml"'}, "extends = 'a.toml': leads back to itself (a.toml -> a.toml); remove one of"),
        (
            {"a": 'extends = "b.toml"', "b": 'extends = "../X/a.toml"'},
            "leads back to itself (a.toml -> b.toml -> a.toml)",
        ),
        ({"a": 'extends = "b.toml"', "b": "name = "}, "b.toml': is not valid TOML ("),
        ({"a": f'extends = "{"x" * 300}"'}, "there is no such file beside"),
        ({"a": 'extends = "b.toml"', "b": "seeds = inf"}, "seeds = inf: is not a finite number"),
    ],
)
def test_recipes_that_cannot_be_extended(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text.replace("../X", f"../{tmp_path.name}"))
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "a.toml")
    assert message in str(caught.value)


def test_only_a_file_extends_another(values):
    with pytest.raises(UserError, match=r"extends = 'x': is not a known key"):
        changed(values, "extends=x")
