"""A recipe's whole run: for each model and seed a chain of stages, then the comparison of arms and the report.

Under torchrun all processes train one model together, and the first one does the rest alone.

Folder of a run:
    recipe.toml                              the resolved recipe
    results.jsonl, report.html, report.md    everything measured, and the page about it
    tokenizer/                               where a model is made from scratch
    <model>/pretrained-seed<k>/trained/      likewise
    <model>/<arm>-seed<k>/{expanded,trained}/, training.json, evaluation/, results.jsonl, diagnostics.jsonl
Every stage writes under another name and renames; what is there already is not done again.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.files import name_full_disk, working_in
from statex.launch import Report, is_main_process, main_process_first, run_in_processes, world_size
from statex.measure import Stopwatch, default_device, device_name, source_commit, versions
from statex.preparation import prepare_run
from statex.progress import Display
from statex.recipe import Arm, Recipe
from statex.results import Result, read_results, write_results
from statex.training import SUMMARY

CHANGED_KINDS = ("statex", "control")
"""The kinds of arms whose mixers are changed before they are trained."""
DIAGNOSTICS = "diagnostics.jsonl"


def run_recipe(recipe: Recipe, *, evaluation: bool = True) -> Path:
    """Run all stages of all models, arms and seeds of a recipe; resume where an earlier run of it stopped.

    Args:
        recipe: the resolved recipe.
        evaluation: False stops after training.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder belongs to another recipe, another process works in it, or a stage refuses its input.
    """
    if recipe.workers > 1 and world_size() > 1:
        problem = "does not go with torchrun, whose processes train one model together"
        raise UserError("workers", recipe.workers, problem, "start one process, or --set workers=1")
    with working_in(recipe.folder, "output") if is_main_process() else nullcontext():
        _run_stages(recipe, evaluation)
        if evaluation and is_main_process():
            from statex.reporting.page import write_report

            write_results(recipe.folder / "results.jsonl", collect_results(recipe))
            write_report(recipe.folder)
    return recipe.folder


def _run_stages(recipe: Recipe, evaluation: bool) -> None:
    """Prepare the run, then its chains: together under torchrun, else one after the other or in worker processes."""
    chains = [(model, seed) for model in recipe.models for seed in recipe.seeds]
    with Display() as display:
        report = display.update if is_main_process() else _silent
        with main_process_first():
            if is_main_process():
                prepare_run(recipe)
        if world_size() > 1:
            _run_under_torchrun(recipe, chains, evaluation, report)
        elif recipe.workers > 1 and len(chains) > 1:
            calls = [(recipe, *chain, evaluation) for chain in chains]
            threads = max(1, torch.get_num_threads() // recipe.workers)
            run_in_processes(run_chain, calls, recipe.workers, threads, report)
        else:
            for chain in chains:
                run_chain(recipe, *chain, evaluation, report)


def run_chain(recipe: Recipe, model: str, seed: int, evaluation: bool, report: Report) -> None:
    """All stages of one model and seed, one after the other."""
    with name_full_disk(recipe.folder):  # in a worker too
        train_chain(recipe, model, seed, report)
        if evaluation:
            evaluate_chain(recipe, model, seed, report)


def train_chain(recipe: Recipe, model: str, seed: int, report: Report) -> None:
    """Train one model with one seed: from scratch where there is no checkpoint, then in each arm."""
    _quiet()
    name = f"{model} seed {seed}"

    def stage_report(stage: str) -> Callable[[int, int], None]:
        report(name, stage, 0, 1)
        return lambda done, total: report(name, stage, done, total)

    base = _base_model(recipe, model, seed)
    if recipe.models[model].pretraining is not None and not _is_trained(base.parent):
        _pretrain(recipe, model, seed, stage_report("pre-train"))
    for arm_name, arm in recipe.arms_of(model).items():
        folder = arm_folder(recipe, model, arm_name, seed)
        start = base
        if arm.kind in CHANGED_KINDS:
            start = folder / "expanded"
            with main_process_first():
                if not start.exists():
                    stage_report(f"expand {arm_name}")
                    expand_folder(base, start, arm, seed)
        if arm.kind != "base" and not _is_trained(folder):
            _train_arm(recipe, arm_name, seed, base, start, folder, stage_report(f"train {arm_name}"))
    report(name, "trained", 1, 1)


def evaluate_chain(recipe: Recipe, model: str, seed: int, report: Report) -> None:
    """Evaluate the arms that `train_chain` trained, and diagnose those whose mixers were expanded or made afresh."""
    _quiet()
    name = f"{model} seed {seed}"
    for arm_name, arm in recipe.arms_of(model).items():
        folder = arm_folder(recipe, model, arm_name, seed)
        trained = _base_model(recipe, model, seed) if arm.kind == "base" else folder / "trained"

        def advance(suite: str, done: int, total: int, arm_name: str = arm_name) -> None:
            report(name, f"evaluate {arm_name}: {suite}", done, total)

        if not (folder / "results.jsonl").exists() or _lacked_data(folder):
            _evaluate_arm(recipe, model, arm_name, seed, trained, folder, advance)
        if arm.kind in CHANGED_KINDS and not (folder / DIAGNOSTICS).exists():
            report(name, f"diagnose {arm_name}", 0, 1)
            _diagnose_arm(recipe, model, arm_name, seed, folder)
    report(name, "done", 1, 1)


def expand_folder(base: Path, out: Path, arm: Arm, seed: int) -> None:
    """Expand (or, for a control, re-initialise) the model in `base` and write it to `out` with its tokenizer."""
    from statex.checkpoint import load, save_with_companions
    from statex.expansion.config import ExpansionConfig
    from statex.expansion.plan import select_layers
    from statex.families import family_of
    from statex.models.expanded import expand, reinitialize

    expansion = (arm.expansion or ExpansionConfig()).model_copy(update={"seed": seed})
    network = load(base)
    if arm.kind == "control":
        recurrent = family_of(network.config).recurrent_layers(network.config)
        reinitialize(network, select_layers(recurrent, expansion), seed)
    else:
        expand(network, expansion)
    save_with_companions(network, base, out)


def collect_results(recipe: Recipe) -> list[Result]:
    """Every arm's results, the comparison of arms, the failures it shows, and the versions that were run."""
    from statex.evaluation.compare import compare_arms
    from statex.evaluation.diagnostics import combine_seeds, failure_signatures

    commit = source_commit()
    results = [Result(suite="run", metric="versions", value=0.0, commit=commit, details=versions())]
    for model in recipe.models:
        folders = {
            (arm, seed): arm_folder(recipe, model, arm, seed) for arm in recipe.arms_of(model) for seed in recipe.seeds
        }
        files = [folder / name for folder in folders.values() for name in ("results.jsonl", DIAGNOSTICS)]
        rows = [row for path in files if path.exists() for row in read_results(path)]
        device = next((row.device for row in rows if row.device), "")
        evaluated = {key: folder / "evaluation" for key, folder in folders.items()}
        evaluated = {key: folder for key, folder in evaluated.items() if (folder / "items").is_dir()}
        baseline = next((arm for arm, settings in recipe.arms_of(model).items() if settings.kind == "lpt"), "lpt")
        expanded = [arm for arm, settings in recipe.arms_of(model).items() if settings.kind == "statex"]
        compared = compare_arms(evaluated, baseline=baseline, model=model, device=device, commit=commit)
        results += rows + combine_seeds(rows) + compared + failure_signatures(compared, baseline, expanded)
    return results


def arm_folder(recipe: Recipe, model: str, arm: str, seed: int) -> Path:
    """Where one arm of one model and seed is kept."""
    return recipe.folder / model / f"{arm}-seed{seed}"


def _base_model(recipe: Recipe, model: str, seed: int) -> Path:
    """The folder of the checkpoint that a chain starts from; `_pretrain` makes it where the recipe names none."""
    checkpoint = recipe.models[model].checkpoint
    return recipe.folder / model / f"pretrained-seed{seed}" / "trained" if checkpoint is None else Path(checkpoint)


def _pretrain(recipe: Recipe, model: str, seed: int, progress: Callable[[int, int], None]) -> None:
    """Make a model of the recipe's configuration and train it."""
    from transformers import set_seed

    from statex.checkpoint import read_tokenizer
    from statex.models.scratch import make_model
    from statex.training.trainer import train

    section, folder = recipe.models[model], _base_model(recipe, model, seed).parent
    assert section.pretraining is not None
    tokenizer = read_tokenizer(recipe.folder / "tokenizer")
    set_seed(seed)
    network = make_model(section.family, section.config, tokenizer)
    train(network, tokenizer, recipe.data, section.pretraining, folder, seed=seed, progress=progress)


def _train_arm(
    recipe: Recipe, arm: str, seed: int, base: Path, start: Path, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Train from `start` in fp32; it is saved in the dtype of `start`, under a card that names `base`."""
    from statex.checkpoint import base_name, load, load_tokenizer, stored_dtype
    from statex.training.trainer import train

    network = load(start, dtype=torch.float32)
    tokenizer = load_tokenizer(start)
    train(
        network,
        tokenizer,
        recipe.data,
        recipe.arm_training(arm),
        folder,
        seed=seed,
        progress=progress,
        base=base_name(base),
        dtype=stored_dtype(start),
    )


def _evaluate_arm(
    recipe: Recipe,
    model: str,
    arm: str,
    seed: int,
    trained: Path,
    folder: Path,
    advance: Callable[[str, int, int], None],
) -> None:
    """Evaluate one trained arm; its figures, its state and what it cost go to `folder/results.jsonl`."""
    from statex.evaluation import Request, measure_model
    from statex.expansion.plan import stored_plan
    from statex.expansion.state import state_report

    network, tokenizer = _load_to_measure(recipe, trained)
    state = state_report(network)
    facts = _facts(network, model, arm, seed)
    note = "of the last call alone: an earlier one had done a part" if (folder / "evaluation").exists() else ""
    watch = Stopwatch(network.device)
    request = Request(
        recipe.evaluation,
        output=folder / "evaluation",
        text=recipe.evaluation.text or recipe.data.text,
        count_text=recipe.data.text,
        training_length=recipe.training.sequence_length,
        shared=recipe.folder / "shared",
        progress=advance,
        identity=facts,
    )
    measured = measure_model(network, tokenizer, request)
    results = measured.results
    if measured.not_run:
        missing = {"tasks": [asdict(one) for one in measured.not_run]}
        results.append(Result("run", "not_run", len(measured.not_run), "tasks", details=missing, **facts))
    plan = stored_plan(network.config)
    fresh = plan.fresh_tensors if plan else set()
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    counts = {
        "state_elements": (state.total_elements, "elements"),
        "state_bytes": (state.total_bytes, "bytes"),
        "parameters": (sum(sizes.values()), "parameters"),
        "fresh_parameters": (sum(size for name, size in sizes.items() if name in fresh), "parameters"),
    }
    results += [Result("state", metric, float(value), unit, **facts) for metric, (value, unit) in counts.items()]
    for layer in state.layers:
        details = {name: getattr(layer, name) for name in ("elements_before", "num_heads", "key_dim", "value_dim")}
        where = {"layer": layer.index}
        results.append(
            Result("state", "state_elements", layer.elements, "elements", slice=where, details=details, **facts)
        )
    results += _cost_results(folder, facts)
    results.append(
        Result("cost", "seconds", watch.seconds(), "s", n=1, slice={"stage": "evaluate"}, note=note, **facts)
    )
    folder.mkdir(parents=True, exist_ok=True)  # nothing made it where nothing was trained and no suite was run
    write_results(folder / "results.jsonl", results)


def _diagnose_arm(recipe: Recipe, model: str, arm: str, seed: int, folder: Path) -> None:
    """What a trained arm does with what its expansion gave it; goes to `folder/diagnostics.jsonl`."""
    from statex.checkpoint import load
    from statex.evaluation import Request
    from statex.evaluation.diagnostics import diagnose

    network, tokenizer = _load_to_measure(recipe, folder / "trained")
    request = Request(
        recipe.evaluation,
        text=recipe.evaluation.text or recipe.data.text,
        training_length=recipe.training.sequence_length,
        identity=_facts(network, model, arm, seed),
    )
    start = load(folder / "expanded", dtype=network.dtype).state_dict()
    write_results(folder / DIAGNOSTICS, diagnose(network, tokenizer, request, start))


def _load_to_measure(recipe: Recipe, trained: Path) -> tuple[Any, Any]:
    """A trained model on the device at hand, in the dtype of all arms however they are stored, and its tokenizer."""
    from statex.checkpoint import load, load_tokenizer

    network: Any = load(trained, dtype=measured_dtype(recipe))
    return network.to(device=default_device()).eval(), load_tokenizer(trained)


def measured_dtype(recipe: Recipe) -> torch.dtype:
    """What all arms of a recipe are measured in: were one coarser, its rounding would count as a difference of arms."""
    from statex.training.arguments import compute_in_bf16

    if recipe.evaluation.dtype != "auto":
        return getattr(torch, recipe.evaluation.dtype)
    in_bf16 = default_device().type == "cuda" and compute_in_bf16(recipe.training.precision)
    return torch.bfloat16 if in_bf16 else torch.float32


def _facts(network: Any, model: str, arm: str, seed: int) -> dict[str, Any]:
    """The fields that all of an arm's results share."""
    from statex.expansion.state import state_report

    return {
        "model": model,
        "arm": arm,
        "seed": seed,
        "state_bytes": state_report(network).total_bytes,
        "device": device_name(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "commit": source_commit(),
    }


def _lacked_data(folder: Path) -> bool:
    """Whether an arm's evaluation left tasks of lm-eval out, whose data may be there by now."""
    return any(row.suite == "run" and row.metric == "not_run" for row in read_results(folder / "results.jsonl"))


def _is_trained(folder: Path) -> bool:
    """Whether a stage of training is finished: its summary is the last that it writes."""
    return (folder / SUMMARY).exists()


def _cost_results(folder: Path, facts: dict[str, Any]) -> Iterator[Result]:
    """What training cost, from its summary; nothing for an arm that was not trained."""
    if not _is_trained(folder):
        return
    facts = facts | {"dtype": ""}  # of training, not of measuring
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    yield Result("cost", "training_tokens_per_second", summary["tokens_per_second"], "tokens/s", n=1, **facts)
    yield Result("cost", "training_peak_memory", summary["peak_memory"], "bytes", n=1, **facts)
    yield Result("cost", "seconds", summary["seconds"], "s", n=1, slice={"stage": "train"}, **facts)


def _run_under_torchrun(recipe: Recipe, chains: list[tuple[str, int]], evaluation: bool, report: Report) -> None:
    """Train all chains together; then the main process evaluates, and no other waits for it and runs out of time."""
    for chain in chains:
        train_chain(recipe, *chain, report)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    for chain in chains if evaluation and is_main_process() else []:
        evaluate_chain(recipe, *chain, report)


def _silent(*event: Any) -> None:
    """The report of a process that does not show anything."""


def _quiet() -> None:
    """Leave the terminal to our own progress: no bars for each file that transformers or datasets read."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
