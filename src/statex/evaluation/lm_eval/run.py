"""Run lm-eval's tasks, and ours in its form, on models that are read through their state.

Tasks are run only where their data is on this machine: nothing is downloaded. What could not run is listed with the
command that fetches its data, and has no value.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.evaluation.context import Request
from statex.evaluation.folder import claim_folder, fingerprint
from statex.evaluation.lm_eval.isolation import offline, quiet
from statex.evaluation.lm_eval.loading import (
    fetch_command,
    import_lm_eval,
    load_tasks,
    runs_code,
    shortest_length,
    task_manager,
    tokens_of_ruler_vt,
)
from statex.evaluation.lm_eval.local_data import check_folder, local_data
from statex.evaluation.lm_eval.samples import first_of_each, scores_of
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score, read_scores, write_scores
from statex.evaluation.summary import generic_suite, summarize
from statex.models.dispatch import statex_ops
from statex.recipe import HarnessTasks
from statex.results import Result
from statex.results.record import NOT_RUN_FILE, SETTINGS_FILES
from statex.results.suites import HARNESS_GROUPS, result_name
from statex.utils.atomic import write_text_atomic

logger = logging.getLogger(__name__)

NO_DATA = (OSError, LookupError, ImportError, ValueError, RuntimeError)
"""Errors of loading a task whose data, or a package it needs, is missing."""


@dataclass(frozen=True)
class NotRun:
    """A task that has no value: why, and the command that fetches what is missing."""

    task: str
    reason: str
    command: str


@dataclass(frozen=True)
class Measured:
    """The outcome of measuring a model: values with their intervals, and the tasks of lm-eval that have none."""

    results: list[Result]
    not_run: list[NotRun]


def run_harness(
    model: torch.nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    request: Request,
    metadata: dict[str, Any] | None = None,
) -> Measured:
    """Run lm-eval's tasks with the settings of `request.evaluation.harness`.

    Args:
        model, tokenizer: as for `measure_model`; RULER's tasks need a tokenizer that was loaded from a folder or the
            hub.
        names: tasks, or groups of HARNESS_GROUPS.
        metadata: further entries of lm-eval's `metadata`, for example {"num_items": 5} for our own tasks.

    Raises:
        UserError: lm-eval is not installed, a name is not known, there is no tokenizer or it has no token to begin
            a text with, a prompt is longer than the model can read, or `output` was made with other settings.
    """
    import_lm_eval()
    from statex.evaluation.lm_eval.model import StateLM  # a subclass of lm-eval's

    if tokenizer is None:
        raise UserError("model", type(model).__name__, "has no tokenizer, which lm-eval's tasks need", "give one")
    settings, output = request.evaluation.harness, request.output
    data = Path(settings.data) if settings.data is not None else None
    if data is not None:
        check_folder(data)
    wanted = list(dict.fromkeys(task for name in names for task in HARNESS_GROUPS.get(name, (name,))))
    meta = _metadata(tokenizer, request) | (metadata or {})
    manager = task_manager(wanted, meta)
    with statex_ops():
        state_model = StateLM(Reader(model), tokenizer, request.evaluation.batch_size)
    if output is not None:
        identity = {"text": request.held_out_text.identity()}
        kept = {"limit": settings.limit, "metadata": meta | identity, "model": fingerprint(model)}
        claim_folder(output, kept, name=SETTINGS_FILES[1])
    facts = request.facts(state_model.reader)
    measured = Measured([], [])
    with statex_ops(), offline(), quiet(), local_data(data):
        for task in wanted:
            name = result_name(task)
            request.progress(name, 0, 1)
            state_model.progress = partial(request.progress, name)
            outcome = _kept_or_run(manager, state_model, task, settings, output)
            if isinstance(outcome, NotRun):
                logger.debug("%s was not run: %s; %s", name, outcome.reason, outcome.command)
                measured.not_run.append(outcome)
                continue
            suite = generic_suite(name, outcome)
            measured.results.extend(summarize(suite, outcome, training_length=request.training_length, **facts))
    if output is not None:
        _keep_not_run(output / NOT_RUN_FILE, measured.not_run, wanted)
    return measured


def _metadata(tokenizer: Any, request: Request) -> dict[str, Any]:
    """lm-eval's `metadata`: the arguments of the functions that make the items of RULER's and our tasks."""
    lengths = request.evaluation.harness.lengths
    return {
        "tokenizer": tokenizer.name_or_path,
        **({"max_seq_lengths": lengths} if lengths else {}),
        "text": request.held_out_text.model_dump(mode="json"),
        "seed": request.evaluation.seed,
    }


def _kept_or_run(
    manager: Any, state_model: Any, task: str, settings: HarnessTasks, output: Path | None
) -> list[Score] | NotRun:
    """The scores of a task that `output` holds, else those of running it, which are then saved there."""
    path = output / "items" / f"{result_name(task)}.jsonl" if output is not None else None
    if path is not None and path.exists():
        return read_scores(path)
    outcome = _run_task(manager, state_model, task, settings)
    if path is not None and not isinstance(outcome, NotRun):
        write_scores(path, outcome)
    return outcome


def _run_task(manager: Any, state_model: Any, name: str, settings: HarnessTasks) -> list[Score] | NotRun:
    import lm_eval

    if settings.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the package `evaluate` asks for
    elif runs_code(manager, name):
        command = f"statex eval MODEL --suite {name} --set evaluation.harness.unsafe_code=true"
        return NotRun(name, "it runs code that the model writes", command)
    try:
        if name == "ruler_vt" and tokens_of_ruler_vt(state_model.tokenizer) > shortest_length(manager):
            reason = "its shortest prompt, or the example in it, is too long with this tokenizer"
            return NotRun(name, reason, "statex eval MODEL --suite variable_tracking")
        tasks = load_tasks(manager, name)
    except UserError:
        raise
    except NO_DATA as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if isinstance(error, IndexError):
            reason = "the split that it is evaluated on has no rows"
        return NotRun(name, reason, fetch_command(manager, name, error))
    if any(task.config.num_fewshot and not len(list(task.fewshot_docs())) for task in tasks):
        command = fetch_command(manager, name, KeyError())
        return NotRun(name, "the split that its examples come from has no rows", command)
    limit = settings.limit
    chosen = {task.task_name: first_of_each(task.eval_docs, limit) for task in tasks} if limit is not None else None
    outcome = lm_eval.simple_evaluate(
        model=state_model, tasks=tasks, samples=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True,
        confirm_run_unsafe_code=settings.unsafe_code,
    )  # fmt: skip
    results, samples = outcome["results"], outcome["samples"]
    scores = [score for task, items in samples.items() for score in scores_of(task, items, results[task])]
    if not scores:
        return NotRun(name, "it has no metric of single items", f"lm_eval --model hf --tasks {name}")
    return scores


def _keep_not_run(path: Path, not_run: list[NotRun], asked: Sequence[str]) -> None:
    """Write what was not run; entries of earlier calls are kept, except for tasks of this one."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [row for row in before if row["task"] not in asked] + [asdict(one) for one in not_run]
    write_text_atomic(path, json.dumps(rows, indent=2) + "\n")
