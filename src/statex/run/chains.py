"""`statex run`: the chains of a recipe, stage after stage, then the comparison of arms and the report.

Under torchrun all processes train one model together, and the first one does the rest alone. Several calls, each with
a selection of the recipe, may share a run's folder.

Folder of a run, beside what the stages write (`statex.run.stages`):
    recipe.toml                              the resolved recipe
    results.jsonl, report.html, report.md    everything measured, and the page about it
    tokenizer/                               where a model is made from scratch
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.recipe import Recipe
from statex.run.collect import unfinished_stages, write_collected
from statex.run.launch import (
    ProgressCallback,
    is_main_process,
    main_process_first,
    run_in_processes,
    visible_gpus,
    world_size,
)
from statex.run.preflight import prepare_run
from statex.run.progress import Display
from statex.run.selection import Chain, Selection, chains_of
from statex.run.stages import PrepareTokens, Stage, arm_folder, measuring_stages, training_stages
from statex.utils.atomic import locked, name_full_disk


def run_recipe(recipe: Recipe, selection: Selection | None = None, *, evaluation: bool = True) -> Path:
    """Run the stages of a recipe; resume where an earlier run of it stopped.

    The report is written by the call after which all stages of the recipe are finished.

    Args:
        recipe: the resolved recipe.
        selection: the models, arms and seeds to run; default: all.
        evaluation: False stops after training.

    Returns:
        The run's folder.

    Raises:
        UserError: the selection names what the recipe does not have, the folder belongs to another recipe, another
            process works on what was selected, or a stage refuses its input.
    """
    chains = chains_of(recipe, selection)
    if recipe.workers > 1 and world_size() > 1:
        problem = "does not go with torchrun, whose processes train one model together"
        raise UserError("workers", recipe.workers, problem, "start one process, or --set workers=1")
    with name_full_disk(recipe.folder):
        with main_process_first():
            if is_main_process():
                with locked(recipe.folder, "output", wait=True):
                    prepare_run(recipe)
        with _claimed(recipe, chains), Display() as display:
            _run_chains(recipe, chains, evaluation, display.update if is_main_process() else _silent)
        if evaluation and is_main_process() and not unfinished_stages(recipe):
            with locked(recipe.folder, "output", wait=True):
                write_collected(recipe)
    return recipe.folder


def prepare_text(recipe: Recipe) -> dict[str, Any]:
    """Tokenise the training text of a recipe, as far as its runs will read it, in one process.

    Returns:
        By model: the `TokenFolder`, or None where nothing reads text. Models of one tokenizer share one.

    Raises:
        UserError: as `run_recipe`, or prepared tokens that are damaged.
    """
    from statex.data.tokens import prepare_tokens

    found: dict[str, Any] = {}
    with name_full_disk(recipe.folder):
        with locked(recipe.folder, "output", wait=True):
            prepare_run(recipe)
        _quiet()
        with Display() as display:
            for chain in chains_of(recipe, Selection(seeds=recipe.seeds[:1])):
                stage, found[chain.model] = PrepareTokens(recipe, chain.model, chain.seed), None
                if stage.needed:
                    shown = partial(display.update, str(chain), stage.title)
                    found[chain.model] = prepare_tokens(
                        recipe.data, stage.tokenizer(), stage.folder, stage.needed, progress=shown
                    )
                display.update(str(chain), "done", 1, 1)
    return found


def run_chain(recipe: Recipe, chain: Chain, evaluation: bool, report: ProgressCallback) -> None:
    """The stages of one chain, one after the other, in one process."""
    with name_full_disk(recipe.folder):  # in a worker too
        train_chain(recipe, chain, report)
        if evaluation:
            measure_chain(recipe, chain, report)


def train_chain(recipe: Recipe, chain: Chain, report: ProgressCallback) -> None:
    """Make, expand and train the models of a chain; under torchrun all processes do it together."""
    _quiet()
    for stage in training_stages(recipe, chain):
        _run_together(stage, chain, report)
    report(str(chain), "trained", 1, 1)


def measure_chain(recipe: Recipe, chain: Chain, report: ProgressCallback) -> None:
    """Evaluate and diagnose the models that `train_chain` trained."""
    _quiet()
    for stage in measuring_stages(recipe, chain):
        if stage.is_needed():
            stage.run(lambda *event: report(str(chain), *event))
    report(str(chain), "done", 1, 1)


def _run_chains(recipe: Recipe, chains: list[Chain], evaluation: bool, report: ProgressCallback) -> None:
    """All chains: together under torchrun, else one after the other or in worker processes."""
    import torch

    if world_size() > 1:
        for chain in chains:
            train_chain(recipe, chain, report)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        for chain in chains if evaluation and is_main_process() else []:  # no other waits, and runs out of time
            measure_chain(recipe, chain, report)
    elif (workers := min(recipe.workers, sum(max(1, len(chain.arms)) for chain in chains))) > 1:
        calls = []
        for start, arms in map(Chain.parts, chains):
            calls.append(((recipe, start, evaluation), [(recipe, arm, evaluation) for arm in arms]))
        threads = max(1, torch.get_num_threads() // workers)
        run_in_processes(run_chain, calls, workers, threads, report, visible_gpus())
    else:
        for chain in chains:
            run_chain(recipe, chain, evaluation, report)


def _run_together(stage: Stage, chain: Chain, report: ProgressCallback) -> None:
    """Run a stage of training where it is not finished; all processes of torchrun see that alike."""

    def progress(title: str, done: int, total: int) -> None:
        report(str(chain), title, done, total)

    with ExitStack() as held:
        with main_process_first():
            if is_main_process():
                if stage.is_shared and not stage.is_finished():
                    held.enter_context(locked(stage.folder, "output", wait=world_size() == 1))
                if stage.by_one_process and not stage.is_finished():
                    stage.run(progress)
            is_done = stage.by_one_process or stage.is_finished()
        if not is_done:
            stage.run(progress)


@contextmanager
def _claimed(recipe: Recipe, chains: list[Chain]) -> Iterator[None]:
    """Inside this context, no other process works on the arms of these chains.

    Raises:
        UserError: one does.
    """
    with ExitStack() as held:
        for chain in chains if is_main_process() else []:
            for arm in chain.arms:
                held.enter_context(locked(arm_folder(recipe, chain.model, arm, chain.seed), "output"))
        yield


def _silent(*event: Any) -> None:
    """The progress callback of a process that shows nothing."""


def _quiet() -> None:
    """Leave the terminal to our own progress: no bars for each file that transformers or datasets read."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
