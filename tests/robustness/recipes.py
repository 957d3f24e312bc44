"""Recipes and overrides with odd values in every place, and what must become of each.

An odd recipe is accepted, and then prepared and trained for a step or two, or it is a UserError and nothing is written.
"""

import dataclasses
import math
import shutil
import typing
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import AutoConfig, TrainingArguments

from statex.errors import UserError
from statex.expansion.config import ExpansionConfig
from statex.models.registration import register_families
from statex.recipe import Recipe, Training, load_recipe
from statex.run import run_recipe
from statex.run.preflight import prepare_run
from tiny_recipe import CONFIGS, recipe_values, write_text

RAW = "@raw@"
"""A value that begins with it stands in the file as it is: what no TOML library would write."""
ODD_VALUES: list[Any] = [
    True, False, 0, 1, 2, 3, 7, 300, -1, -16, 10**5, 10**6, 10**7, 10**8, 10**9, 10**12, 10**18, 2**31, 2**32, 2**63,
    10**30, 0.0, 0.5, 1.0, -1.0, 1e-320, 1e9, 9e18, 32e12, 1e308, math.nan, math.inf, -math.inf, "", "x", "nonsense",
    "\0", "a\nb", "../b", "/etc/passwd", "/dev/null/x", "/proc/x", "x" * 300, "float16", "gelu", "silu", "full_shard",
    "recipe.toml", "results.jsonl", [], {}, [1], [0.0, 1.0], [1.0, 0.0], [4294967296], [[16, 4]], [10**8], {"a": 1},
    {"load_in_8bit": True}, RAW + "9" * 5000, RAW + "0x" + "f" * 5000, RAW + "[" * 3000 + "]" * 3000,
    RAW + "{a=" * 3000 + "1" + "}" * 3000, RAW + "1979-05-27", RAW + "07:32:00", RAW + "'\\ud800'",
]  # fmt: skip
OPTIMIZERS = ["adafactor", "sgd", "adamw_bnb_8bit", "galore_adamw", "adamw_torch_fused", "no_such"]
FAMILIES = {family.removeprefix("statex_"): family for family in CONFIGS}
values = (
    st.sampled_from(ODD_VALUES)
    | st.integers(-4, 64)
    | st.floats()
    | st.sampled_from([True, False, 1, 2, 4, 8, 0.5, 1.0])
)
GENERAL = ["dtype", "id2label", "num_labels", "quantization_config", "text_config", "return_dict", "model_type"]
"""Fields that transformers knows of every configuration."""
SLOW = ("deepspeed",)
"""Fields of TrainingArguments whose trial takes a library that is not installed."""


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all values of a section and of those within it."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        keys += [f"{prefix}{name}", *(keys_of(inner, f"{prefix}{name}.") if inner is not None else [])]
    return keys


def make_base(place: Path, family: str) -> dict[str, Any]:
    """A recipe of one model and two arms that trains two steps of 64 tokens."""
    values = recipe_values(str(place / "text" / "*.txt"), place / "runs", [FAMILIES[family]])
    values["arms"] = {name: values["arms"][name] for name in ("lpt", "preserve")}
    for section in (values["training"], values["models"][family]["pretraining"]):
        section |= {"steps": 2, "tokens_per_step": 64, "save_every": 1}
    return values


@st.composite
def odd_recipes(draw: Any) -> tuple[str, str, list[tuple[str, Any]], bool, bool]:
    """(kind, family, changes, whether they are given as --set, whether an accepted one is trained)."""
    register_families()
    kind = draw(st.sampled_from(["recipe", "config", "trainer", "expansion", "names"]))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    own = [field.name for field in dataclasses.fields(type(AutoConfig.for_model(FAMILIES[family])))]
    trainer = [field.name for field in dataclasses.fields(TrainingArguments) if not field.name.startswith(SLOW)]
    keys = {
        "recipe": [*keys_of(Recipe), *(f"models.{family}.pretraining.{key}" for key in keys_of(Training)), "nonsense"],
        "config": [f"models.{family}.config.{name}" for name in [*own, *GENERAL]],
        "trainer": [f"training.trainer.{name}" for name in trainer],
        "expansion": [f"arms.preserve.expansion.{name}" for name in ExpansionConfig.model_fields],
        "names": ["name", "output", "models.{}.family", "arms.{}.kind"],
    }[kind]
    changes = []
    for _ in range(draw(st.integers(1, 2))):
        key, value = draw(st.sampled_from(keys)), draw(values)
        if "{}" in key:
            key, value = key.format(draw(st.sampled_from([v for v in ODD_VALUES if isinstance(v, str)]))), "lpt"
        if key.endswith("trainer.optim"):
            value = draw(st.sampled_from(OPTIMIZERS))
        changes.append((key, value))
    return kind, family, changes, draw(st.booleans()), draw(st.integers(0, 9)) == 0


def try_recipe(place: Path, case: tuple[str, str, list[tuple[str, Any]], bool, bool]) -> str:
    """What becomes of an odd recipe, which is "refused", "accepted" or "accepted, trained".

    Raises:
        AssertionError: it was refused and something is written.
        Exception: whatever else it ends in, which is a failure.
    """
    kind, family, changes, as_overrides, is_trained = case
    if not (place / "text").exists():
        write_text(place / "text")
    path, before = place / "recipe.toml", _files(place)
    values, raw = make_base(place, family), [(f"k{i}", value) for i, (_, value) in enumerate(changes)]
    overrides = [f"{key}={_toml(value)}" for key, value in changes] if as_overrides else []
    for key, value in [] if as_overrides else changes:
        _put(values, key, value)
    text = tomli_w.dumps(values)
    for _, value in raw:
        if isinstance(value, str) and value.startswith(RAW):
            text = text.replace(tomli_w.dumps({"k": value}).partition(" = ")[2].strip(), value.removeprefix(RAW))
    path.write_text(text, encoding="utf-8")
    recipe = None
    try:
        recipe = load_recipe(path, overrides)
        if not recipe.output.startswith((str(place), "/dev", "/proc", "/etc")):
            recipe = recipe.model_copy(update={"output": str(place / "runs")})  # not where the tests are run
        prepare_run(recipe)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    finally:
        path.unlink()
    if message:
        assert message.isprintable(), message
        assert _files(place) == before, "something was written"
        return f"{kind}: refused"
    assert recipe is not None
    try:
        assert (recipe.folder / "recipe.toml").is_file()
        if is_trained and _is_short(recipe):
            run_recipe(recipe, evaluation=False)
            return f"{kind}: accepted, trained"
        return f"{kind}: accepted"
    finally:
        shutil.rmtree(recipe.folder)
        shutil.rmtree(place / "runs", ignore_errors=True)


def _is_short(recipe: Recipe) -> bool:
    stages = [recipe.training, *(model.pretraining for model in recipe.models.values() if model.pretraining)]
    return len(recipe.seeds) == 1 and all(stage.steps <= 2 and stage.tokens_per_step <= 4096 for stage in stages)


def _files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if "text" not in path.parts and path.name != "recipe.toml"}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".") if not key.startswith(("models.", "arms.")) else key.split(".", key.count("."))
    for section in sections:
        inner = values.get(section)
        values[section] = inner if isinstance(inner, dict) else {}
        values = values[section]
    values[last] = value


def _toml(value: Any) -> str:
    """A value as an override writes it; text without its quotation marks."""
    if isinstance(value, str):
        return value.removeprefix(RAW)
    return tomli_w.dumps({"k": value}).partition("=")[2].strip() if not isinstance(value, dict) else "{ a = 1 }"
