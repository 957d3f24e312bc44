"""Run lm-eval's tasks, and ours in its form, on models that are read through their state.

Tasks are run only where their data is at hand: nothing is downloaded. What could not run is listed with the command
that fetches its data, and has no figure.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score, digest, read_scores, write_scores
from statex.evaluation.runner import claim_folder, fingerprint
from statex.evaluation.summary import generic_suite, summarize
from statex.measure import device_name, source_commit
from statex.models.dispatch import statex_ops
from statex.results import Result

logger = logging.getLogger(__name__)

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Task files of our own, for lm-eval's `include_path`."""

OUR_TASKS = {path.stem for path in TASKS_FOLDER.glob("statex_*.yaml")}
"""Without lm-eval's thousands of files, looking up a task takes no time."""

HARNESS_GROUPS: dict[str, tuple[str, ...]] = {
    "recall": ("swde", "fda", "squad_completion", "statex_triviaqa", "statex_nq", "statex_drop"),
    "common-sense": ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa"),
    "icl": ("statex_trec", "statex_banking77", "statex_clinc150"),
    "generalisation": ("gsm8k", "humaneval", "mbpp"),
    "long-context": (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "ruler_vt", "ruler_cwe", "ruler_fwe",
    ),
    "statex": (
        "statex_passkey", "statex_niah_single_1", "statex_niah_single_2", "statex_niah_single_3",
        "statex_niah_multikey", "statex_variable_tracking", "statex_symbol_icl",
    ),
}  # fmt: skip
"""Names that stand for several of lm-eval's tasks."""

SLICED_METRIC = re.compile(r"(?:(shots)_)?(\d+)")

NO_DATA = (OSError, LookupError, ImportError, ValueError, RuntimeError)
"""What loading a task raises whose data, or a package it needs, is missing."""


@dataclass(frozen=True)
class NotRun:
    """A task that has no figure: why, and the command that fetches what it lacks."""

    task: str
    reason: str
    command: str


@dataclass(frozen=True)
class HarnessRun:
    """What `run_harness` gives: a figure with its interval for each task that ran, and the tasks that did not."""

    results: list[Result]
    not_run: list[NotRun]


def run_harness(
    model: torch.nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    output: Path | None = None,
    limit: int | None = None,
    lengths: list[int] | None = None,
    batch_size: int = 8,
    metadata: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
) -> HarnessRun:
    """Run lm-eval's tasks.

    Args:
        model, tokenizer: as for `evaluate`; RULER's tasks need a tokenizer that was loaded from a folder or the hub.
        names: tasks, or groups of HARNESS_GROUPS.
        output: a folder for the scores of every item and `not_run.json`; a second call continues from there.
        limit: items of each task, None for all.
        lengths: of RULER's and our tasks, in tokens; None for their defaults.
        metadata: more of lm-eval's `metadata`, for example {"text": {"files": ["docs/*.md"]}} for our haystacks.
        identity: fields of every Result: model, arm, seed, state_bytes.

    Raises:
        UserError: lm-eval is not installed, a name is not known, a prompt is longer than the model can read, or
            `output` was made with other settings.
    """
    lm_eval = _import_lm_eval()
    from statex.evaluation.harness.model import StateLM

    wanted = list(dict.fromkeys(task for name in names for task in HARNESS_GROUPS.get(name, (name,))))
    meta = {"tokenizer": tokenizer.name_or_path} | ({"max_seq_lengths": lengths} if lengths else {}) | (metadata or {})
    manager = lm_eval.tasks.TaskManager(
        include_path=str(TASKS_FOLDER), metadata=meta, include_defaults=not all(name in OUR_TASKS for name in wanted)
    )
    _require_known(wanted, manager)
    if output is not None:
        settings = {"limit": limit, "metadata": meta, "model": fingerprint(model)}
        claim_folder(output, settings, name="harness.json")
    reader = Reader(model)
    facts = {"device": device_name(reader.device), "commit": source_commit()} | (identity or {})
    results: list[Result] = []
    not_run: list[NotRun] = []
    with statex_ops(), offline():
        state_model = StateLM(reader, tokenizer, batch_size)
        for name in wanted:
            path = output / "items" / f"{name}.jsonl" if output is not None else None
            if path is not None and path.exists():
                scores = read_scores(path)
            else:
                outcome = _run_task(lm_eval, manager, state_model, name, limit)
                if isinstance(outcome, NotRun):
                    logger.warning("%s was not run: %s; %s", name, outcome.reason, outcome.command)
                    not_run.append(outcome)
                    continue
                scores = outcome
                if path is not None:
                    write_scores(path, scores)
            results += summarize(generic_suite(name, scores), scores, **facts)
    if output is not None:
        rows = json.dumps([asdict(one) for one in not_run], indent=2)
        (output / "not_run.json").write_text(rows + "\n", encoding="utf-8")
    return HarnessRun(results, not_run)


def _import_lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            "suite", "lm-eval", f"cannot be imported ({error})", "install it with pip install 'statex[eval]'"
        ) from error
    return lm_eval


def _require_known(names: Sequence[str], manager: Any) -> None:
    known = {*manager.all_tasks}
    for name in names:
        if name not in known:
            groups = ", ".join(HARNESS_GROUPS)
            raise UserError("tasks", name, "lm-eval has no such task", f"give one of lm-eval's, or a group: {groups}")


@contextmanager
def offline() -> Iterator[None]:
    """Within it, data sets come from the disk only, and what is missing fails at once."""
    import datasets.config
    import huggingface_hub.constants

    places = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _run_task(lm_eval: Any, manager: Any, state_model: Any, name: str, limit: int | None) -> list[Score] | NotRun:
    try:
        tasks = list(manager.load([name])["tasks"].values())
    except UserError:
        raise
    except NO_DATA as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return NotRun(name, reason, _fetch_command(manager, name, error))
    unsafe = [task for task in tasks if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code")]
    if unsafe:
        return NotRun(
            name, "it executes code that the model writes", f"lm_eval --confirm_run_unsafe_code --tasks {name}"
        )
    outcome = lm_eval.simple_evaluate(
        model=state_model, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return [score for task, samples in outcome["samples"].items() for score in scores_of(task, samples)]


def _fetch_command(manager: Any, name: str, error: Exception) -> str:
    """The command that fetches what a task lacks."""
    if isinstance(error, ImportError):
        return "pip install 'statex[eval]' nltk"
    if "punkt" in str(error):
        return "python -c \"import nltk; nltk.download('punkt_tab')\""
    path, subset = _data_set(manager, name)
    arguments = ", ".join(repr(part) for part in (path, subset) if part)
    return f'python -c "import datasets; datasets.load_dataset({arguments})"'


def _data_set(manager: Any, name: str) -> tuple[str | None, str | None]:
    """The data set of a task and its configuration, as its file says it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    source = config.get("class", config.get("custom_dataset"))
    path = config.get("dataset_path") or getattr(source, "DATASET_PATH", None)
    return path, config.get("dataset_name") or getattr(source, "DATASET_NAME", None)


def scores_of(task: str, samples: list[dict[str, Any]]) -> list[Score]:
    """Items of lm-eval's log as scores.

    A metric that is named by a length (as RULER's are) or by shots becomes `accuracy` in that slice; -1 is lm-eval's
    mark for a length that an item does not have. Metrics that are no numbers of single items are left out.
    """
    scores = []
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter'].replace('-', '_')}"
        where: dict[str, int] = {}
        values: dict[str, float] = {}
        for name in sample["metrics"]:
            value = sample[name]
            if not isinstance(value, int | float):
                continue
            if sliced := SLICED_METRIC.fullmatch(name):
                if value != -1:
                    where[sliced[1] or "length"] = int(sliced[2])
                    values["accuracy"] = float(value)
            else:
                values[name + suffix] = float(value)
        if values:
            cluster, asked = f"{task}/{sample['doc_id']}", digest(sample["prompt_hash"], sample["target_hash"])
            scores.append(Score(f"{task}{suffix}/{sample['doc_id']}", cluster, where, values, digest=asked))
    return scores
