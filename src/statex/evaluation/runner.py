"""`measure_model`: our suites and lm-eval's tasks on one model; `evaluate`: our suites alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from statex.data.tokenizer import prefix_token
from statex.errors import UserError
from statex.evaluation.context import Context, Request
from statex.evaluation.folder import claim_folder, fingerprint
from statex.evaluation.lm_eval import (
    Measured,
    check_folder,
    check_task_lengths,
    import_lm_eval,
    run_harness,
    task_manager,
)
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score, read_scores, write_scores
from statex.evaluation.suite import Suite
from statex.evaluation.suites import find_suite
from statex.evaluation.summary import summarize
from statex.models.dispatch import statex_ops
from statex.recipe import Evaluation
from statex.results import Result
from statex.results.suites import HARNESS_GROUPS, SUITES, known_names, split_names, suite_groups, task_name
from statex.settings import Recall, TextSource


def measure_model(model: torch.nn.Module, tokenizer: Any, request: Request) -> Measured:
    """Run everything that `request.evaluation.suites` names: our suites first, then lm-eval's tasks.

    Args:
        model: any causal language model of the Hugging Face interface, already on its device.
        tokenizer: the model's; None for a model without one, which only some suites support.

    Raises:
        UserError: what `evaluate` and `run_harness` raise; names are checked before anything runs.
    """
    check_names(request.evaluation.suites)
    suites, tasks = split_names(request.evaluation.suites)
    if tasks:
        with statex_ops():
            limit = Reader(model).max_context()
        check_task_lengths(tasks, request.evaluation.harness, limit)
    ours = request.evaluation.model_copy(update={"suites": suites})
    results = evaluate(model, tokenizer, replace(request, evaluation=ours)) if suites else []
    if not tasks:
        return Measured(results, [])
    theirs = run_harness(model, tokenizer, tasks, request)
    return Measured([*results, *theirs.results], theirs.not_run)


def evaluate(model: torch.nn.Module, tokenizer: Any, request: Request) -> list[Result]:
    """Run the suites of `request.evaluation.suites`, all of them ours, and return their results.

    Args:
        model, tokenizer: as for `measure_model`.

    Raises:
        UserError: an unknown suite, missing text or tokenizer, text too short for a length, a prompt longer than the
            model can read, or an `output` that was made with other settings.
    """
    suites = [find_suite(name) for name in request.evaluation.suites]
    reader = Reader(model)
    with statex_ops():
        context = request.context(reader, tokenizer)
    for suite in suites:
        suite.check(context)
    if request.output is not None:
        claim_folder(request.output, settings_of(context))
    facts = request.facts(reader)
    results = []
    with statex_ops():
        for suite in suites:
            scores = _scores(suite, context, request)
            results += summarize(suite, scores, training_length=request.training_length, **facts)
    return results


def check_names(names: Sequence[str]) -> None:
    """Check the names of suites, groups and tasks, and that lm-eval is installed where one is lm-eval's.

    Raises:
        UserError: an unknown name, or lm-eval is not installed.
    """
    grouped = {task for tasks in HARNESS_GROUPS.values() for task in tasks}
    theirs = [name for name in names if name not in SUITES and name not in suite_groups()]
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


def check_items(
    tokenizer: Any,
    evaluation: Evaluation,
    text: TextSource,
    training_length: int,
    recall: Recall | None = None,
    limit: int | None = None,
    model: str = "",
) -> None:
    """Raise what building the items would raise, as far as that can be found cheaply and without the model.

    Args:
        recall: the recipe's recall data, where MQAR is trained.
        limit: the most tokens that the model can read, None for a purely recurrent one.
        model: what the recipe calls it, for errors.

    Raises:
        UserError: a length without room for its question, or more than the model can read, text or a document too short
            for a length, a vocabulary too small, keys or values that do not occur in training, or a tokenizer that
            lm-eval's tasks cannot use.
    """
    reader = cast(Any, None)
    context = Context(reader, tokenizer, evaluation, text, text, training_length, limit, recall=recall, model=model)
    suites, tasks = split_names(evaluation.suites)
    for name in suites:
        find_suite(name).check(context)
    if tasks:
        prefix_token(tokenizer)
        if evaluation.harness.data is not None:
            check_folder(Path(evaluation.harness.data))
        check_task_lengths(tasks, evaluation.harness, limit, model)


def settings_of(context: Context) -> dict[str, Any]:
    """Everything the scores depend on, except the choice of suites: a suite's scores do not depend on the others."""
    return {
        "evaluation": context.evaluation.model_dump(mode="json", exclude={"suites", "text", "harness", "dtype"}),
        "text": context.text.identity(),
        "count_text": context.count_text.identity(),
        "training_length": context.training_length,
        "model": fingerprint(context.reader.model),
    }


def _scores(suite: Suite, context: Context, request: Request) -> list[Score]:
    """The scores of all of a suite's items; cells on disk are read, the others are scored and written."""
    path = request.output / "items" / f"{suite.name}.jsonl" if request.output is not None else None
    scores = read_scores(path) if path is not None and path.exists() else []
    done = {score.item.partition("/")[0] for score in scores}
    cells = suite.cells(context)
    for number, cell in enumerate(cells):
        request.progress(suite.name, number, len(cells))
        if cell.name in done:
            continue
        scores += suite.score(context, cell)
        if path is not None:
            write_scores(path, scores)
    request.progress(suite.name, len(cells), len(cells))
    return scores
