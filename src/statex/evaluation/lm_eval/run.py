"""Run lm-eval's tasks, and ours in its form, on models that are read through their state.

Tasks are run only where their data is at hand: nothing is downloaded. What could not run is listed with the command
that fetches its data, and has no figure.
"""

import json
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.evaluation.lm_eval.local_data import check_folder, local_data
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score, digest, read_scores, write_scores
from statex.evaluation.runner import claim_folder, fingerprint
from statex.evaluation.summary import generic_suite, summarize
from statex.files import write_whole
from statex.measure import device_name, source_commit
from statex.models.dispatch import statex_ops
from statex.recipe import TextSource
from statex.results import Result
from statex.results.record import NOT_RUN_FILE, SETTINGS_FILES
from statex.results.suites import HARNESS_GROUPS, known_names, result_name

logger = logging.getLogger(__name__)

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Task files of our own, for lm-eval's `include_path`."""

FOLDERS = (
    "arc", "fda", "gsm8k", "hellaswag", "humaneval", "mbpp", "piqa", "ruler", "siqa", "squad_completion", "swde",
    "winogrande",
)  # fmt: skip
"""Of lm-eval's tasks, those that HARNESS_GROUPS names: they are indexed at once, all of its 14,000 files in seconds."""

SLICED_METRIC = re.compile(r"(?:(shots)_)?(\d+)(?:_(seen|unseen))?")
SLICED_BY = ("max_length", "shots", "symbols")
"""What the documents of RULER's and our tasks call their length, their number of shots, and whether these show it."""

DATA_SET = re.compile(r"'([\w.-]+/[\w.-]+)'")
"""The name of a data set in the message that it is missing."""

NO_DATA = (OSError, LookupError, ImportError, ValueError, RuntimeError)
"""What loading a task raises whose data, or a package it needs, is missing."""


METRIC = re.compile(r"Module '([\w./-]+)' doesn't exist")
"""The name of a metric that `evaluate` would fetch from the hub, in the message that it is missing."""

GENERATION = {"squad_completion": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}}
"""What Based and JRT ran, where lm-eval's defaults (256 tokens, to an empty line) overrule its own task."""

SEED = 1234
"""Of the random module while a task is loaded: RULER draws its items from it."""


@dataclass(frozen=True)
class NotRun:
    """A task that has no figure: why, and the command that fetches what it lacks."""

    task: str
    reason: str
    command: str


@dataclass(frozen=True)
class Measured:
    """What measuring a model gave: figures with their intervals, and the tasks of lm-eval that have none."""

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
    unsafe_code: bool = False,
    metadata: dict[str, Any] | None = None,
    training_length: int | None = None,
    data: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> Measured:
    """Run lm-eval's tasks.

    Args:
        model, tokenizer: as for `evaluate`; RULER's tasks need a tokenizer that was loaded from a folder or the hub.
        names: tasks, or groups of HARNESS_GROUPS.
        output: a folder for the scores of every item and `not_run.json`; a second call continues from there.
        limit: items of each task, and of each of its lengths or numbers of shots; None for all.
        lengths: of RULER's and our tasks, in tokens; None for their defaults.
        unsafe_code: run the code that the model writes, which the scores of humaneval and mbpp need.
        metadata: more of lm-eval's `metadata`, for example {"text": {"files": ["docs/*.md"]}} for our haystacks.
        training_length: tokens of a training sequence; figures past it are marked.
        data: a folder of data sets that are read instead of the hub's (`local_data`).
        progress: called with a task's name, its answers so far and their number.
        identity: fields of every Result: model, arm, seed, state_bytes.

    Raises:
        UserError: lm-eval is not installed, a name is not known, there is no tokenizer or it has no token to begin a
            text with, a prompt is longer than the model can read, or `output` was made with other settings.
    """
    lm_eval = import_lm_eval()
    from statex.evaluation.lm_eval.model import StateLM

    if tokenizer is None:
        raise UserError("model", type(model).__name__, "has no tokenizer, which lm-eval's tasks need", "give one")
    if data is not None:
        check_folder(data)
    wanted = list(dict.fromkeys(task for name in names for task in HARNESS_GROUPS.get(name, (name,))))
    meta = {"tokenizer": tokenizer.name_or_path} | ({"max_seq_lengths": lengths} if lengths else {}) | (metadata or {})
    manager = task_manager(wanted, meta)
    reader = Reader(model)
    with statex_ops():
        state_model = StateLM(reader, tokenizer, batch_size)
    if output is not None:
        named = {"text": TextSource.model_validate(meta["text"]).identity()} if "text" in meta else {}
        settings = {"limit": limit, "metadata": meta | named, "model": fingerprint(model)}
        claim_folder(output, settings, name=SETTINGS_FILES[1])
    facts = {"device": device_name(reader.device), "commit": source_commit()} | (identity or {})
    report = progress or (lambda *_: None)
    results: list[Result] = []
    not_run: list[NotRun] = []
    with statex_ops(), offline(), quiet(), local_data(data):
        for task in wanted:
            name = result_name(task)
            report(name, 0, 1)
            state_model.progress = partial(report, name)
            path = output / "items" / f"{name}.jsonl" if output is not None else None
            if path is not None and path.exists():
                scores = read_scores(path)
            else:
                outcome = _run_task(lm_eval, manager, state_model, task, limit, unsafe_code)
                if isinstance(outcome, NotRun):
                    logger.debug("%s was not run: %s; %s", name, outcome.reason, outcome.command)
                    not_run.append(outcome)
                    continue
                scores = outcome
                if path is not None:
                    write_scores(path, scores)
            results += summarize(generic_suite(name, scores), scores, training_length=training_length, **facts)
    if output is not None:
        _keep_not_run(output / NOT_RUN_FILE, not_run, wanted)
    return Measured(results, not_run)


def import_lm_eval() -> Any:
    """The package lm-eval.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            "suites", "lm-eval", f"needs lm-eval, which is not there ({error})",
            "install it with pip install 'statex[eval]'",
        ) from error  # fmt: skip
    return lm_eval


def task_manager(tasks: Sequence[str], metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's index of tasks, of which all of `tasks` are.

    Raises:
        UserError: lm-eval is not installed, or a task is neither in it nor ours.
    """
    lm_eval = import_lm_eval()
    folders = [TASKS_FOLDER, *(Path(lm_eval.tasks.__file__).parent / name for name in FOLDERS)]
    manager = lm_eval.tasks.TaskManager(include_path=folders, metadata=metadata, include_defaults=False)
    if not {*tasks} <= {*manager.all_tasks}:
        manager = lm_eval.tasks.TaskManager(include_path=TASKS_FOLDER, metadata=metadata)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError("evaluation.suites", name, "is not a suite", known_names())
    return manager


def _keep_not_run(path: Path, not_run: list[NotRun], asked: Sequence[str]) -> None:
    """Write what was not run; earlier calls' stay, but for what was asked again."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [row for row in before if row["task"] not in asked] + [asdict(one) for one in not_run]
    write_whole(path, json.dumps(rows, indent=2) + "\n")


@contextmanager
def offline() -> Iterator[None]:
    """Within it, data comes from the disk only, and what is missing fails at once."""
    import datasets.config
    import huggingface_hub.constants

    changes: list[tuple[Any, str, Any]] = [
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ]
    try:
        import nltk

        changes.append((nltk, "download", _no_download))
    except ImportError:
        pass
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, lm-eval logs errors alone, and what tasks print goes to standard error: --json has the other."""
    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        theirs.setLevel(before)


def _no_download(*args: Any, **kwargs: Any) -> bool:
    """What nltk's own answers without a network."""
    return False


def _run_task(
    lm_eval: Any, manager: Any, state_model: Any, name: str, limit: int | None, unsafe_code: bool
) -> list[Score] | NotRun:
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the package `evaluate` asks for
    elif _runs_code(manager, name):
        command = f"statex eval MODEL --suite {name} --set evaluation.harness.unsafe_code=true"
        return NotRun(name, "it runs code that the model writes", command)
    try:
        if name == "ruler_vt" and _tokens_of_ruler_vt(state_model.tokenizer) > _shortest(manager):
            reason = "its shortest prompt, or the example in it, is too long with this tokenizer"
            return NotRun(name, reason, "statex eval MODEL --suite variable_tracking")
        tasks = load_tasks(manager, name)
    except UserError:
        raise
    except NO_DATA as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if isinstance(error, IndexError):
            reason = "the split that it asks about has no rows"
        return NotRun(name, reason, _fetch_command(manager, name, error))
    if any(task.config.num_fewshot and not len(list(task.fewshot_docs())) for task in tasks):
        return NotRun(
            name, "the split that its examples come from has no rows", _fetch_command(manager, name, KeyError())
        )
    chosen = {task.task_name: _first_of_each(task.eval_docs, limit) for task in tasks} if limit is not None else None
    outcome = lm_eval.simple_evaluate(
        model=state_model, tasks=tasks, samples=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True,
        confirm_run_unsafe_code=unsafe_code,
    )  # fmt: skip
    scores = [score for task, samples in outcome["samples"].items() for score in scores_of(task, samples)]
    if not scores:
        return NotRun(name, "it gives no figure of single items", f"lm_eval --model hf --tasks {name}")
    return scores


def load_tasks(manager: Any, name: str) -> list[Any]:
    """The task of this name, or those of lm-eval's group, with their items; the same ones in every call."""
    state = random.getstate()
    random.seed(SEED)
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # it has a generator of its own, which would go on
    try:
        tasks = list(manager.load([name])["tasks"].values())
    finally:
        random.setstate(state)
    for task in tasks:
        if task.task_name in GENERATION:
            task.set_config("generation_kwargs", GENERATION[task.task_name])
    return tasks


def _tokens_of_ruler_vt(tokenizer: Any) -> float:
    """About what the shortest prompt of ruler_vt takes; infinity where its example does not fit the 500 tokens it has.

    With fewer, lm-eval tries on for ever, and no interrupt stops it: it catches everything.
    """
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    state = random.getstate()
    example, prompt = (generate_input_output(noises, 1, 4, is_icl=noises == 5)[0] for noises in (5, 10))
    random.setstate(state)
    example_tokens, prompt_tokens = (len(tokenizer(text)["input_ids"]) + 30 for text in (example, prompt))
    return prompt_tokens + 500 if example_tokens <= 500 else float("inf")


def _shortest(manager: Any) -> int:
    """The shortest length that is asked of RULER's tasks; their default is 4096."""
    return min((manager.metadata or {}).get("max_seq_lengths") or [4096])


def _first_of_each(documents: Any, limit: int) -> list[int]:
    """The places of `limit` documents: the first ones; of each length, or number of shots and kind, evenly spread.

    The documents of one length come in the order of their depths: the first ones would be of the same.
    """
    keys = [name for name in SLICED_BY if name in (getattr(documents, "column_names", None) or [])]
    if not keys:
        return list(range(min(limit, len(documents))))
    places: dict[Any, list[int]] = {}
    for place, value in enumerate(zip(*(documents[key] for key in keys), strict=True)):
        places.setdefault(value, []).append(place)
    return sorted(
        part[number * len(part) // count]
        for part in places.values()
        for count in [min(limit, len(part))]
        for number in range(count)
    )


def _runs_code(manager: Any, name: str) -> bool:
    """Whether the task's scores come of running what the model writes; before loading it, which runs code too."""
    return bool(_task_file(manager, name, resolve=False).get("unsafe_code"))


def _fetch_command(manager: Any, name: str, error: Exception) -> str:
    """The command that fetches what a task lacks."""
    text = str(error)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return f"pip install --upgrade {package}" if package else "pip install 'statex[eval]' nltk"
    if "punkt" in text:
        return "python -c \"import nltk; nltk.download('punkt_tab')\""
    if named := METRIC.search(text):
        return f"python -c \"import evaluate; evaluate.load('{named[1]}')\""
    config = _task_file(manager, name, resolve=True)
    source = config.get("class", config.get("custom_dataset"))
    path = config.get("dataset_path") or getattr(source, "DATASET_PATH", None)
    subset = config.get("dataset_name") or getattr(source, "DATASET_NAME", None)
    if named := DATA_SET.search(text):  # RULER's files do not say which one they load
        path, subset = named[1], subset if named[1] == path else None
    if path is None:
        return f"lm_eval --model dummy --tasks {name} --limit 1"
    arguments = ", ".join(repr(part) for part in (path, subset) if part)
    return f'python -c "import datasets; datasets.load_dataset({arguments})"'


def _task_file(manager: Any, name: str, *, resolve: bool) -> dict[str, Any]:
    """What the file of a task says; nothing for a group of tasks. `resolve` imports the functions that it names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = manager.task_index[name].yaml_path
    return load_yaml(path, resolve_func=resolve) if path is not None else {}


def scores_of(task: str, samples: list[dict[str, Any]]) -> list[Score]:
    """Items of lm-eval's log as scores.

    A metric that is named by a length (as RULER's are), or by shots and whether the symbol asked for was among them,
    becomes `accuracy` in that slice; -1 is lm-eval's mark for a length that an item does not have. Metrics that are no
    numbers of single items are left out.
    """
    scores = []
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter'].replace('-', '_')}"
        where: dict[str, Any] = {}
        values: dict[str, float] = {}
        for name in sample["metrics"]:
            value = sample[name]
            if not isinstance(value, int | float):
                continue
            if sliced := SLICED_METRIC.fullmatch(name):
                if value != -1:
                    where[sliced[1] or "length"] = int(sliced[2])
                    where |= {"symbols": sliced[3]} if sliced[3] else {}
                    values["accuracy"] = float(value)
            else:
                values[name + suffix] = float(value)
        if values:
            cluster, asked = f"{task}/{sample['doc_id']}", digest(sample["prompt_hash"], sample["target_hash"])
            scores.append(Score(f"{task}{suffix}/{sample['doc_id']}", cluster, where, values, digest=asked))
    return scores
