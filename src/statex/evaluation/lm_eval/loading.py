"""Find and load lm-eval's tasks, and say what to do about those that cannot be loaded."""

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.models.limits import require_context
from statex.recipe import HarnessTasks
from statex.results.suites import HARNESS_GROUPS, known_names
from statex.utils.hub import limit_waiting

TASKS_FOLDER = Path(__file__).parent / "task_files"
"""Our own task files, for lm-eval's `include_path`; lm-eval would take a folder `lm_eval/tasks` for its own."""

FOLDERS = (
    "arc", "fda", "gsm8k", "hellaswag", "humaneval", "lambada", "mbpp", "piqa", "ruler", "siqa", "squad_completion",
    "swde", "winogrande",
)  # fmt: skip
"""The folders of lm-eval's tasks in HARNESS_GROUPS, and of LAMBADA: indexed at once, where all of its 14,000 files take
seconds."""

DATA_SET = re.compile(r"'([\w.-]+/[\w.-]+)'")
"""The name of a data set in the error that it is missing."""

METRIC = re.compile(r"Module '([\w./-]+)' doesn't exist")
"""The name of a metric, which `evaluate` would fetch from the hub, in the error that it is missing."""

GENERATION = {"squad_completion": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}}
"""The settings of Based and JRT; lm-eval's defaults (256 tokens, until an empty line) override its own task."""

RULER_LENGTHS, LENGTHS = [4096], [1024, 2048, 4096]
"""Tokens of prompts where a recipe names no lengths: of RULER's tasks, as lm-eval has it, and of ours."""

SEED = 1234
"""Seed of the random module while a task is loaded: RULER draws its items with it."""


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
            "suites", "lm-eval", f"needs lm-eval, which is not installed ({error})",
            "install it with pip install 'statex[eval]'",
        ) from error  # fmt: skip
    return lm_eval


def task_manager(tasks: Sequence[str], metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's index of tasks, which contains all of `tasks`.

    Raises:
        UserError: lm-eval is not installed, or a task is neither in it nor ours.
    """
    lm_eval = import_lm_eval()
    folders = [TASKS_FOLDER, *(Path(lm_eval.tasks.__file__).parent / name for name in FOLDERS)]
    manager = lm_eval.tasks.TaskManager(include_path=folders, metadata=metadata, include_defaults=False)
    unknown = _unmentioned(Path(lm_eval.tasks.__file__).parent, {*tasks} - {*manager.all_tasks})
    if not unknown and not {*tasks} <= {*manager.all_tasks}:
        manager = lm_eval.tasks.TaskManager(include_path=TASKS_FOLDER, metadata=metadata)
        unknown = {*tasks} - {*manager.all_tasks}
    for name in tasks:
        if name in unknown:
            raise UserError("evaluation.suites", name, "is not a suite", known_names())
    return manager


def _unmentioned(folder: Path, names: set[str]) -> set[str]:
    """Names that no task file mentions: reading the files takes a second, indexing them by lm-eval twenty."""
    for file in folder.rglob("*.yaml") if names else ():
        text = file.read_text(encoding="utf-8")
        names = {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)}
        if not names:
            break
    return names


def load_tasks(manager: Any, name: str) -> list[Any]:
    """The task of this name, or those of lm-eval's group, with their items; the same ones in every call."""
    state = random.getstate()
    random.seed(SEED)
    limit_waiting()
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # its own generator would continue where it stopped
    try:
        tasks = list(manager.load([name])["tasks"].values())
    finally:
        random.setstate(state)
    for task in tasks:
        if task.task_name in GENERATION:
            task.set_config("generation_kwargs", GENERATION[task.task_name])
    return tasks


def tokens_of_ruler_vt(tokenizer: Any) -> float:
    """About the length of ruler_vt's shortest prompt; infinity where its example exceeds the 500 tokens reserved.

    Without that room lm-eval retries forever, and cannot be interrupted, as it catches everything.
    """
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    state = random.getstate()
    example, prompt = (generate_input_output(noises, 1, 4, is_icl=noises == 5)[0] for noises in (5, 10))
    random.setstate(state)
    example_tokens, prompt_tokens = (len(tokenizer(text)["input_ids"]) + 30 for text in (example, prompt))
    return prompt_tokens + 500 if example_tokens <= 500 else float("inf")


def shortest_length(manager: Any) -> int:
    """The shortest length of RULER's tasks in this run."""
    return min((manager.metadata or {}).get("max_seq_lengths") or RULER_LENGTHS)


def check_task_lengths(tasks: Sequence[str], settings: HarnessTasks, limit: int | None, model: str = "") -> None:
    """Refuse tasks whose prompts are longer than the model can read, where their length is one that is asked for.

    That is so of RULER's, which count what the model generates, and of our needles, which do not. Of all others only
    the data tells.

    Args:
        tasks: names, without groups of HARNESS_GROUPS.
        limit: the most tokens that the model can read, None for a purely recurrent one.
        model: what the recipe calls it, for errors.

    Raises:
        UserError: a length, by default the task's own, is more than the limit.
    """
    if limit is None:
        return
    manager = task_manager(tasks)
    for name in tasks:
        defaults, generated = [], 0
        if Path(manager.task_index[name].yaml_path or "").parent.name == "ruler":
            defaults = RULER_LENGTHS
        elif name in HARNESS_GROUPS["statex"] and name != "statex_symbol_icl":
            defaults = LENGTHS
            generated = _task_file(manager, name, resolve=False)["generation_kwargs"]["max_gen_toks"]
        for length in (settings.lengths or defaults) if defaults else ():
            value = length if settings.lengths else f"{length}, the default of {name}"
            require_context("evaluation.harness.lengths", value, length + generated, limit, model)


def runs_code(manager: Any, name: str) -> bool:
    """Whether scoring the task runs code that the model writes; known without loading it, which runs code too."""
    return bool(_task_file(manager, name, resolve=False).get("unsafe_code"))


def fetch_command(manager: Any, name: str, error: Exception) -> str:
    """The command that fetches what a task is missing."""
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
    if named := DATA_SET.search(text):  # RULER's task files do not name the set that they load
        path, subset = named[1], subset if named[1] == path else None
    if path is None:
        return f"lm_eval --model dummy --tasks {name} --limit 1"
    arguments = ", ".join(repr(part) for part in (path, subset) if part)
    return f'python -c "import datasets; datasets.load_dataset({arguments})"'


def _task_file(manager: Any, name: str, *, resolve: bool) -> dict[str, Any]:
    """The content of a task's file; empty for a group of tasks. `resolve` imports the functions that it names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = manager.task_index[name].yaml_path
    return load_yaml(path, resolve_func=resolve) if path is not None else {}
