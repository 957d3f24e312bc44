"""`measure_model`: our suites and lm-eval's tasks on one model, as the command line and recipes name them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.evaluation.context import text_source
from statex.evaluation.lm_eval import Measured, import_lm_eval, run_harness, task_manager
from statex.evaluation.runner import evaluate
from statex.recipe import Evaluation, TextSource
from statex.results.suites import HARNESS_GROUPS, SUITE_GROUPS, SUITE_TITLES, known_names, split_names, task_name


def measure_model(
    model: torch.nn.Module,
    tokenizer: Any,
    evaluation: Evaluation,
    *,
    output: Path | None = None,
    text: TextSource | None = None,
    count_text: TextSource | None = None,
    training_length: int | None = None,
    shared: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> Measured:
    """Run all that `evaluation.suites` names: our suites first, then lm-eval's tasks.

    Args: those of `evaluate`.

    Raises:
        UserError: what `evaluate` and `run_harness` raise; names are checked before anything runs.
    """
    check_names(evaluation.suites)
    suites, tasks = split_names(evaluation.suites)
    measured = Measured([], [])
    if suites:
        measured.results.extend(
            evaluate(
                model, tokenizer, evaluation.model_copy(update={"suites": suites}), output=output, text=text,
                count_text=count_text, training_length=training_length, shared=shared, progress=progress,
                identity=identity,
            )
        )  # fmt: skip
    if tasks:
        source = text_source(evaluation, text)
        settings = evaluation.harness
        run = run_harness(
            model, tokenizer, tasks, output=output, limit=settings.limit, lengths=settings.lengths,
            batch_size=evaluation.batch_size, unsafe_code=settings.unsafe_code,
            data=Path(settings.data) if settings.data is not None else None,
            metadata={"text": source.model_dump(mode="json"), "seed": evaluation.seed},
            training_length=training_length, progress=progress, identity=identity,
        )  # fmt: skip
        measured.results.extend(run.results)
        measured.not_run.extend(run.not_run)
    return measured


def check_names(names: Sequence[str]) -> None:
    """Check the names of suites, groups and tasks, and that lm-eval is there where one is lm-eval's.

    Raises:
        UserError: a name that nobody knows, or lm-eval is not installed.
    """
    grouped = {task for tasks in HARNESS_GROUPS.values() for task in tasks}
    theirs = [name for name in names if name not in SUITE_TITLES and name not in SUITE_GROUPS]
    others = [name for name in theirs if name not in HARNESS_GROUPS and task_name(name) not in grouped]
    try:
        if theirs:
            import_lm_eval()
    except UserError as error:
        if others:
            raise UserError("evaluation.suites", others[0], "is not a suite", known_names()) from error
        raise UserError("evaluation.suites", theirs[0], error.problem, error.remedy) from error
    if others:
        task_manager(split_names(others)[1])
