"""What comes before the first stage of a run: its recipe checked, its tokenizer trained, its folder made.

A mistake must be told before anything is written, and before hours of pre-training, not after them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w

from statex.errors import UserError, explained
from statex.recipe import Arm, Model, Recipe, Training, load_recipe
from statex.utils.atomic import new_folder, write_text_atomic


def prepare_run(recipe: Recipe) -> None:
    """Make the run's folder, with the resolved recipe and the tokenizer of models made from scratch; or go on with it.

    Raises:
        UserError: another recipe made the folder, or a stage of this one would refuse its input.
    """
    folder, path = recipe.folder, recipe.folder / "recipe.toml"
    _check_place(folder)
    if path.exists():
        refuse_other_recipe(load_recipe(path), recipe)
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            "output", str(folder), "exists and is no run's folder", "give this run another name, or remove that folder"
        )
    tokenizer = check_recipe(recipe)
    if folder.exists():
        folder.rmdir()
    with new_folder(folder) as temporary:
        values = recipe.model_dump(mode="json", exclude_none=True)
        write_text_atomic(temporary / path.name, tomli_w.dumps(values))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary / "tokenizer")


def _check_place(folder: Path) -> None:
    """Raise UserError where no folder can be made, before anything is.

    The system is asked by making one and removing it again: no test of permissions knows all that may be in the way.
    """
    with explained("output", str(folder), "cannot be the folder of a run", "change output or name"):
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise UserError("output", str(folder), f"{place} is no folder", "change output or name")
        longest = os.pathconf(place, "PC_NAME_MAX") - len("..lock")
        if any(len(os.fsencode(part)) > longest for part in folder.parts):
            raise UserError("output", str(folder), f"has a part longer than {longest} bytes", "shorten it")
        if place != folder.absolute():
            TemporaryDirectory(prefix=".statex-", dir=place).cleanup()


def refuse_other_recipe(made_by: Recipe, recipe: Recipe) -> None:
    """Raise UserError unless both are the same run.

    It is the same wherever it is kept, however many processes share the work, and where a record that cannot be read
    is now skipped: it was not passed before.
    """
    excluded: Any = {
        "workers": True, "output": True, "data": {"text": {"bad_records"}}, "evaluation": {"text": {"bad_records"}},
    }  # fmt: skip
    before, now = (each.model_dump(mode="json", exclude=excluded) for each in (made_by, recipe))
    if before != now:
        key = _first_difference(before, now)
        raise UserError(
            "output", str(recipe.folder), f"was made by another recipe (they differ in {key})",
            "give this run another name (--set name=...), or remove that folder",
        )  # fmt: skip


def check_recipe(recipe: Recipe) -> Any:
    """Raise what the stages of a recipe would, as far as it shows without training.

    Returns:
        The tokenizer of models made from scratch, None where there are none.

    Raises:
        UserError: a suite, model, expansion or setting that does not exist or fit, a checkpoint that is not whole or
            has no tokenizer, text that is missing, or shorter than one sequence, or a length of an evaluation that has
            no room for its question or more than its text.
    """
    from statex.data.documents import open_documents
    from statex.data.tokenizer import train_tokenizer
    from statex.evaluation import check_names
    from statex.training.trial import try_training

    check_names(recipe.evaluation.suites)
    tried = set()
    for section, training in _stages(recipe):
        if (settings := training.model_dump_json()) not in tried:
            tried.add(settings)
            with _errors_in(section):
                try_training(training, recipe.data.reset_state_at_documents)
    open_documents(recipe.data.text)
    text = recipe.evaluation.text
    open_documents(text or recipe.data.text, part="held_out", field="evaluation.text" if text else "data.text")

    from_scratch = any(model.family is not None for model in recipe.models.values())
    tokenizer = train_tokenizer(recipe.data.text, recipe.data.tokenizer, recipe.data.recall) if from_scratch else None
    for name, model in recipe.models.items():
        _check_model(recipe, name, model, tokenizer)
    return tokenizer


def _check_model(recipe: Recipe, name: str, model: Model, tokenizer: Any) -> None:
    """The model's configuration, weights, plans and batches; `tokenizer` is that of models made from scratch."""
    from statex.checkpoint import inspect, load_config, load_tokenizer
    from statex.evaluation import check_items
    from statex.models.scratch import make_config

    with _errors_in(f"models.{name}"):
        if model.checkpoint is not None:
            inspect(model.checkpoint)
            config, tokenizer = load_config(model.checkpoint), load_tokenizer(model.checkpoint)
            if tokenizer is None:
                remedy = "save the model's tokenizer into its folder"
                raise UserError("checkpoint", model.checkpoint, "has no tokenizer", remedy)
        elif model.pretraining is None:
            raise UserError("pretraining", None, "is missing", "say how the model of this family is pre-trained")
        else:
            config = make_config(model.family, model.config, tokenizer)
    _check_network(recipe, name, model, config)
    text = recipe.evaluation.text or recipe.data.text
    recall = recipe.data.recall if any(stage.weights.mqar for _, stage in _stages(recipe, name)) else None
    check_items(tokenizer, recipe.evaluation, text, recipe.training.sequence_length, recall)
    checked = set()
    for section, training in _stages(recipe, name):
        if (settings := training.model_dump_json()) not in checked:
            checked.add(settings)
            _check_batches(recipe, section, training, tokenizer)


def _check_network(recipe: Recipe, name: str, model: Model, config: Any) -> None:
    """The model, and what each arm makes of it: planned, compared with the memory, and tried with a few tokens."""
    from statex.expansion.config import ExpansionConfig
    from statex.models.trial import model_without_memory, try_model
    from statex.training.memory import require_memory, size_of

    recall = recipe.data.recall
    key, value = ("config", model.config) if model.checkpoint is None else ("checkpoint", model.checkpoint)
    field = f"models.{name}.{key}"
    network = model_without_memory(field, value, config)
    size = size_of(network)
    if model.pretraining is not None:
        require_memory(field, value, size, f"models.{name}.pretraining", model.pretraining, recall)
    try_model(field, value, config, size.weights + size.state)
    for arm_name, arm in recipe.arms_of(name).items():
        section = f"arms.{arm_name}"
        stage = f"{section}.training" if arm.training else "training"
        if arm.kind == "lpt":
            require_memory(field, value, size, stage, recipe.arm_training(arm_name), recall)
        elif arm.kind != "base":
            expansion = arm.expansion or ExpansionConfig()
            with _errors_in(f"{section}.expansion"):
                plan = _plan(network, arm)
            grown = size_of(network, plan)
            own = f"{section}.expansion", expansion.model_dump(exclude_unset=True)
            require_memory(*own, grown, stage, recipe.arm_training(arm_name), recall)
            try_model(*own, config, grown.weights + grown.state, partial(_change, arm))


def _plan(network: Any, arm: Arm) -> Any:
    """What an arm of kind statex or control makes of a model on the meta device."""
    from statex.expansion.config import ExpansionConfig
    from statex.expansion.plan import plan_expansion, plan_reinitialization, select_layers
    from statex.families import family_of

    expansion = arm.expansion or ExpansionConfig()
    recurrent = family_of(network.config).recurrent_layers(network.config)
    with explained("factor", expansion.factor, "cannot be planned", "correct the expansion"):
        if arm.kind == "statex":
            return plan_expansion(network, expansion)
        return plan_reinitialization(network, select_layers(recurrent, expansion))


def _change(arm: Arm, network: Any, one_layer: bool) -> None:
    """Do to a model what an arm does; to its first layer where it has no other."""
    from statex.expansion.config import ExpansionConfig
    from statex.expansion.plan import select_layers
    from statex.families import family_of
    from statex.models.expanded import expand, reinitialize

    expansion = arm.expansion or ExpansionConfig()
    if one_layer:
        expansion = expansion.model_copy(update={"layers": None, "num_layers": None, "every": 1})
    if arm.kind == "statex":
        expand(network, expansion)
    else:
        reinitialize(network, select_layers(family_of(network.config).recurrent_layers(network.config), expansion))


def _check_batches(recipe: Recipe, section: str, training: Training, tokenizer: Any) -> None:
    from statex.data.mixture import TrainingBatches

    with _errors_in(section):
        TrainingBatches(recipe.data, training, tokenizer)


def _stages(recipe: Recipe, model: str | None = None) -> Iterator[tuple[str, Training]]:
    """The stages of training of one model, or of all, each with the name of its section."""
    for name in recipe.models if model is None else [model]:
        pretraining = recipe.models[name].pretraining
        if pretraining is not None:
            yield f"models.{name}.pretraining", pretraining
        for arm_name, arm in recipe.arms_of(name).items():
            if arm.kind != "base":
                yield f"arms.{arm_name}.training" if arm.training else "training", recipe.arm_training(arm_name)


@contextmanager
def _errors_in(section: str) -> Iterator[None]:
    """Name the field of an error as the recipe does: of a stage, that of its section; `data` is named in full."""
    try:
        yield
    except UserError as error:
        named_in_full = error.field.startswith(("data.", "evaluation."))
        field = error.field if named_in_full else f"{section}.{error.field.removeprefix('training.')}"
        raise UserError(field, error.value, error.problem, error.remedy) from error


def _first_difference(before: Any, now: Any, key: str = "") -> str:
    """The dotted name of the first value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                return _first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    return key
