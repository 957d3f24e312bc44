"""What comes before the first stage of a run: its recipe checked, its tokenizer trained, its folder made.

A mistake must be reported before anything is written, and before hours of pre-training rather than after.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w

from statex.errors import UserError, explained
from statex.recipe import Recipe, load_recipe
from statex.run.inputs import Inputs
from statex.run.measuring import changed_settings, record_evaluation
from statex.run.selection import Selection, chains_of
from statex.run.stages import Evaluate, arm_folder, measuring_stages, training_stages
from statex.utils.atomic import new_folder, write_text_atomic
from statex.utils.nested import first_difference

logger = logging.getLogger(__name__)

Check = Callable[[Inputs], None]


def prepare_run(recipe: Recipe) -> None:
    """Make the run's folder, with the resolved recipe and the tokenizer of models made from scratch; or resume in it.

    Raises:
        UserError: another recipe made the folder, or a stage of this one would refuse its input.
    """
    folder, path = recipe.folder, recipe.folder / "recipe.toml"
    _check_place(folder)
    if path.exists():
        made_by = load_recipe(path)
        refuse_other_recipe(made_by, recipe)
        _take_evaluation(made_by, recipe)
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            "output",
            str(folder),
            "exists and is not the folder of a run",
            "give this run another name, or remove that folder",
        )
    inputs = check_recipe(recipe)
    if folder.exists():
        folder.rmdir()
    with new_folder(folder) as temporary:
        _write_recipe(temporary / path.name, recipe)
        if inputs.tokenizer is not None:
            inputs.tokenizer.save_pretrained(temporary / "tokenizer")


def check_recipe(recipe: Recipe, *, is_started: bool = True) -> Inputs:
    """Raise what the stages of a recipe would raise, as far as can be known without training.

    Args:
        is_started: whether the processes that will train are already running.

    Returns:
        What the stages were checked against, including the tokenizer of models made from scratch.

    Raises:
        UserError: a suite, model, expansion or setting that does not exist or fit, a checkpoint that is incomplete or
            has no tokenizer, text that is missing or shorter than one sequence, a sequence or a prompt that is longer
            than a model can read, or an evaluation length that is too short for its question or too long for its text.
    """
    inputs = Inputs(recipe, is_started=is_started)
    for check in checks_of(recipe):
        check(inputs)
    return inputs


def checks_of(recipe: Recipe) -> list[Check]:
    """All checks: of names and text, then of each stage of the first seed."""
    stages = [
        stage
        for chain in chains_of(recipe, Selection(seeds=recipe.seeds[:1]))
        for stage in [*training_stages(recipe, chain), *measuring_stages(recipe, chain)]
    ]
    return [_check_suites, _check_text, *(stage.check for stage in stages)]


def _check_suites(inputs: Inputs) -> None:
    from statex.evaluation import check_names

    check_names(inputs.recipe.evaluation.suites)


def _check_text(inputs: Inputs) -> None:
    from statex.data.documents import open_documents

    recipe = inputs.recipe
    open_documents(recipe.data.text)
    text = recipe.evaluation.text
    open_documents(text or recipe.data.text, part="held_out", field="evaluation.text" if text else "data.text")


def _check_place(folder: Path) -> None:
    """Raise UserError where the folder cannot be made.

    Makes the folder and removes it again: no test of permissions covers everything that may prevent it.
    """
    with explained("output", str(folder), "cannot be the folder of a run", "change output or name"):
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise UserError("output", str(folder), f"{place} is not a folder", "change output or name")
        longest = os.pathconf(place, "PC_NAME_MAX") - len("..lock")
        if any(len(os.fsencode(part)) > longest for part in folder.parts):
            raise UserError("output", str(folder), f"has a part longer than {longest} bytes", "shorten it")
        if place != folder.absolute():
            TemporaryDirectory(prefix=".statex-", dir=place).cleanup()


def refuse_other_recipe(made_by: Recipe, recipe: Recipe) -> None:
    """Raise UserError unless both are the same run.

    A run stays the same if it or its tokens are moved, if another number of processes shares the work or a sequence, if
    its models are measured or watched differently, if steps are captured or no longer, or if unusable records or steps
    are now skipped: until now none was.
    """
    free: Any = {"bad_steps", "most_bad_steps", "spike", "sequence_parallel", "watch_state_every", "cuda_graphs"}
    excluded: Any = {
        "workers": True,
        "output": True,
        "evaluation": True,
        "training": free,
        "models": {"__all__": {"pretraining": free}},
        "arms": {"__all__": {"training": free}},
        "data": {"text": {"bad_records"}, "tokens": True, "workers": True},
    }
    before, now = (each.model_dump(mode="json", exclude=excluded) for each in (made_by, recipe))
    if before != now:
        key, *_ = first_difference(before, now)
        raise UserError(
            "output", str(recipe.folder), f"was made by another recipe (they differ in {key})",
            "give this run another name (--set name=...), or remove that folder",
        )  # fmt: skip


def _take_evaluation(made_by: Recipe, recipe: Recipe) -> None:
    """Where the evaluation was edited, check it and write it to the run's recipe; the stages see what it changes.

    Results of the old one are first marked as such: arms of earlier versions have no record.
    """
    changed = changed_settings(made_by.evaluation, recipe.evaluation)
    if not changed:
        return
    inputs = Inputs(recipe)
    for check in checks_of(recipe):
        if check in (_check_suites, _check_text) or isinstance(getattr(check, "__self__", None), Evaluate):
            check(inputs)
    begun = [
        folder
        for chain in chains_of(recipe)
        for arm in chain.arms
        if ((folder := arm_folder(recipe, chain.model, arm, chain.seed)) / "evaluation").is_dir()
    ]
    for folder in begun:
        record_evaluation(folder, made_by.evaluation)
    _write_recipe(recipe.folder / "recipe.toml", made_by.model_copy(update={"evaluation": recipe.evaluation}))
    if begun:
        keys = ", ".join(f"evaluation.{name}" for name in changed)
        logger.warning("%s: %s changed; results that depend on it are replaced, arm by arm", recipe.folder, keys)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    write_text_atomic(path, tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
