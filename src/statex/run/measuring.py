"""What is measured of an arm, and with which settings; after an edit of them, only what depends on it is repeated."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from statex.recipe import Evaluation, Recipe
from statex.results import Result, read_results
from statex.results.record import NOT_RUN_FILE, SETTINGS_FILES
from statex.training import SUMMARY
from statex.utils.atomic import write_text_atomic
from statex.utils.environment import default_device, device_name, source_commit

RESULTS = "results.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
SECTION = Path("evaluation", "section.json")
"""The file that records the evaluation section with which an arm was measured."""


def was_measured_by(folder: Path, evaluation: Evaluation) -> bool:
    """Whether an arm's folder was measured with this evaluation; assumed where the folder has no record."""
    before = _recorded(folder)
    return before is None or not changed_settings(before, evaluation)


def changed_settings(before: Evaluation, now: Evaluation) -> list[str]:
    """The keys of the evaluation that differ, apart from the handling of records that cannot be read."""
    return [name for name, value in _settings(now).items() if _settings(before)[name] != value]


def record_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Record the settings with which the arm in a folder is measured, unless they are already recorded."""
    if not (folder / SECTION).exists():
        _write(folder, evaluation)


def begin_evaluation(folder: Path, evaluation: Evaluation) -> bool:
    """Remove what was measured with other settings, and record these.

    The scores of suites whose settings are the same stay. The record is written last, so that a call that is killed
    in between is repaired by the next.

    Returns:
        Whether an earlier call has started measuring.
    """
    begun_before = (folder / "evaluation").exists()
    before = _recorded(folder)
    changed = changed_settings(before, evaluation) if before is not None else []
    if changed:
        for name in (RESULTS, DIAGNOSTICS):
            (folder / name).unlink(missing_ok=True)
        _remove_scores(folder / "evaluation", {*changed} - {"suites"}, evaluation)
    if before is None or changed:
        _write(folder, evaluation)
    return begun_before


def _remove_scores(folder: Path, changed: set[str], evaluation: Evaluation) -> None:
    """Remove the scores that depend on changed settings; a suite's own section affects that suite alone."""
    sections = {name for name, value in evaluation if isinstance(value, BaseModel)} - {"text"}
    if changed - sections:
        shutil.rmtree(folder / "items", ignore_errors=True)
    for path in (folder / "items").glob("*.jsonl"):
        if (path.stem if path.stem in sections else "harness") in changed:
            path.unlink()
    for name in (*SETTINGS_FILES, NOT_RUN_FILE) if changed else ():
        (folder / name).unlink(missing_ok=True)


def _recorded(folder: Path) -> Evaluation | None:
    path = folder / SECTION
    return Evaluation.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(folder: Path, evaluation: Evaluation) -> None:
    (folder / SECTION).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / SECTION, evaluation.model_dump_json(indent=2) + "\n")


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_dump(mode="json") | {"text": evaluation.text and evaluation.text.identity()}


def lacked_data(folder: Path) -> bool:
    """Whether an arm's evaluation left out tasks of lm-eval whose data may have arrived since."""
    return any(row.suite == "run" and row.metric == "not_run" for row in read_results(folder / RESULTS))


def measurements(
    recipe: Recipe,
    trained: Path,
    folder: Path,
    begun_before: bool,
    identity: dict[str, Any],
    progress: Callable[[str, int, int], None],
) -> list[Result]:
    """The scores of a trained arm in every suite, its state, and what it cost.

    Args:
        trained: the model's folder.
        folder: the arm's, where the scores of single items are kept.
        begun_before: whether an earlier call has done part of it.
        identity: model, arm and seed of every result.
        progress: called with a suite, the cells done and their number.
    """
    from statex.evaluation import Request, measure_model
    from statex.utils.timing import Stopwatch

    network, tokenizer = _load_to_measure(recipe, trained)
    facts = _facts(network, identity)
    watch = Stopwatch(network.device)
    request = Request(
        recipe.evaluation,
        output=folder / "evaluation",
        text=recipe.evaluation.text or recipe.data.text,
        count_text=recipe.data.text,
        training_length=recipe.training.sequence_length,
        shared=recipe.folder / "shared",
        progress=progress,
        identity=facts,
    )
    measured = measure_model(network, tokenizer, request)
    results = measured.results
    if measured.not_run:
        missing = {"tasks": [asdict(one) for one in measured.not_run]}
        results.append(Result("run", "not_run", len(measured.not_run), "tasks", details=missing, **facts))
    note = "of the last call only: an earlier call had done part of the work" if begun_before else ""
    seconds = Result("cost", "seconds", watch.seconds(), "s", n=1, slice={"stage": "evaluate"}, note=note, **facts)
    return [*results, *_state_results(network, facts), *_training_cost(folder, facts), seconds]


def diagnosis(recipe: Recipe, trained: Path, start: Path, identity: dict[str, Any]) -> list[Result]:
    """How a trained arm uses what its expansion added; `start` is the model it was trained from."""
    from statex.checkpoint import load
    from statex.evaluation import Request
    from statex.evaluation.diagnostics import diagnose

    network, tokenizer = _load_to_measure(recipe, trained)
    facts = _facts(network, identity)
    request = Request(
        recipe.evaluation,
        text=recipe.evaluation.text or recipe.data.text,
        training_length=recipe.training.sequence_length,
        identity=facts,
    )
    results = diagnose(network, tokenizer, request, load(start, dtype=network.dtype).state_dict())
    return [*results, *_use_in_training(trained.parent, facts)]


def _use_in_training(folder: Path, facts: dict[str, Any]) -> Iterator[Result]:
    """What `training.watch_state_every` found of the new state, as means over layers; nothing where it was not set."""
    facts = facts | {"dtype": ""}  # of training, not of measuring
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    for use in summary.get("state_use", []):  # earlier versions have none
        for name, unit in (("new_state_energy", "fraction"), ("effective_rank", "")):
            layers = {key.rpartition("_")[2]: value for key, value in use.items() if key.startswith(f"{name}_layer_")}
            mean, where = sum(layers.values()) / len(layers), {"step": use["step"]}
            yield Result(
                "diagnostics", f"{name}_in_training", mean, unit, n=1, slice=where, details={"layers": layers}, **facts
            )


def measured_dtype(recipe: Recipe) -> Any:
    """The dtype that all arms are measured in: otherwise rounding would count as a difference between arms."""
    import torch

    from statex.training.arguments import compute_in_bf16

    if recipe.evaluation.dtype != "auto":
        return getattr(torch, recipe.evaluation.dtype)
    in_bf16 = default_device().type == "cuda" and compute_in_bf16(recipe.training.precision)
    return torch.bfloat16 if in_bf16 else torch.float32


def _load_to_measure(recipe: Recipe, trained: Path) -> tuple[Any, Any]:
    """A trained model on the device at hand, in the common dtype of all arms, and its tokenizer."""
    from statex.checkpoint import load, load_tokenizer

    network: Any = load(trained, dtype=measured_dtype(recipe))
    return network.to(device=default_device()).eval(), load_tokenizer(trained)


def _facts(network: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """The fields that all of an arm's results share."""
    from statex.expansion.state import state_report

    return identity | {
        "state_bytes": state_report(network).total_bytes,
        "device": device_name(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "commit": source_commit(),
    }


def _state_results(network: Any, facts: dict[str, Any]) -> Iterator[Result]:
    """The size of the state, whole and layer by layer, and the number of parameters."""
    from statex.expansion.state import state_report
    from statex.expansion.stored import stored_plan

    state, plan = state_report(network), stored_plan(network.config)
    fresh = plan.fresh_tensors if plan else set()
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    counts = {
        "state_elements": (state.total_elements, "elements"),
        "state_bytes": (state.total_bytes, "bytes"),
        "parameters": (sum(sizes.values()), "parameters"),
        "fresh_parameters": (sum(size for name, size in sizes.items() if name in fresh), "parameters"),
    }
    for metric, (value, unit) in counts.items():
        yield Result("state", metric, float(value), unit, **facts)
    for layer in state.layers:
        details = {name: getattr(layer, name) for name in ("elements_before", "num_heads", "key_dim", "value_dim")}
        where = {"layer": layer.index}
        yield Result("state", "state_elements", layer.elements, "elements", slice=where, details=details, **facts)


def _training_cost(folder: Path, facts: dict[str, Any]) -> Iterator[Result]:
    """The cost of training, from its summary; nothing for an arm that was not trained."""
    if not (folder / SUMMARY).exists():
        return
    facts = facts | {"dtype": ""}  # of training, not of measuring
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    yield Result("cost", "training_tokens_per_second", summary["tokens_per_second"], "tokens/s", n=1, **facts)
    yield Result("cost", "training_peak_memory", summary["peak_memory"], "bytes", n=1, **facts)
    if "data_wait" in summary:  # earlier versions did not measure it
        yield Result("cost", "training_data_wait", summary["data_wait"], "fraction", n=1, **facts)
    yield Result("cost", "seconds", summary["seconds"], "s", n=1, slice={"stage": "train"}, **facts)
