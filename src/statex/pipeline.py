"""A recipe's whole run: for each model and seed a chain of stages, then the comparison of arms and the report.

Folder of a run:
    recipe.toml                              the resolved recipe
    results.jsonl, report.html, report.md    everything measured, and the page about it
    tokenizer/                               where a model is made from scratch
    <model>/pretrained-seed<k>/trained/      likewise
    <model>/<arm>-seed<k>/{expanded,trained}/, training.json, evaluation/, results.jsonl
Every stage writes under another name and renames; what is there already is not done again.
"""

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from statex.errors import UserError
from statex.measure import Stopwatch, device_name, source_commit, versions
from statex.progress import Display
from statex.recipe import Arm, Recipe, load_recipe
from statex.results import Result, read_results, write_results

Report = Callable[[str, str, int, int], None]
"""Called with chain, stage, done, total."""


def run_recipe(recipe: Recipe, *, evaluation: bool = True) -> Path:
    """Run all stages of all models, arms and seeds of a recipe; go on where an earlier run of it stopped.

    Args:
        recipe: the resolved recipe.
        evaluation: False stops after training.

    Returns:
        The run's folder.

    Raises:
        UserError: the folder belongs to another recipe, or a stage refuses its input.
    """
    folder = claim_run_folder(recipe)
    chains = [(model, seed) for model in recipe.models for seed in recipe.seeds]
    with Display() as display:
        _ensure_tokenizer(recipe)
        if recipe.workers > 1 and len(chains) > 1:
            _run_in_processes(recipe, chains, evaluation, display.update)
        else:
            for model, seed in chains:
                run_chain(recipe, model, seed, evaluation, display.update)
    if evaluation and _is_main_process():
        from statex.reporting.page import write_report

        write_results(folder / "results.jsonl", collect_results(recipe))
        write_report(folder)
    return folder


def claim_run_folder(recipe: Recipe) -> Path:
    """Make the run's folder and write the recipe into it, or check that it was made by the same recipe.

    Raises:
        UserError: another recipe made it.
    """
    folder, path = recipe.folder, recipe.folder / "recipe.toml"
    if path.exists():
        made_by = load_recipe(path)
        if _identity(made_by) != _identity(recipe):
            key = _first_difference(_identity(made_by), _identity(recipe))
            raise UserError(
                "output", str(folder), f"was made by another recipe (they differ in {key})",
                "give this run another name (--set name=...), or remove that folder",
            )  # fmt: skip
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(
            "output", str(folder), "exists and is no run's folder", "give this run another name, or remove that folder"
        )
    elif _is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".recipe.toml.tmp")
        temporary.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        os.replace(temporary, path)
    return folder


def run_chain(recipe: Recipe, model: str, seed: int, evaluation: bool, report: Report) -> None:
    """All stages of one model and seed, one after the other."""
    from accelerate import PartialState

    main_process_first = PartialState().main_process_first
    _quiet()
    name = f"{model} seed {seed}"

    def stage_report(stage: str) -> Callable[[int, int], None]:
        report(name, stage, 0, 1)
        return lambda done, total: report(name, stage, done, total)

    base = _base_model(recipe, model, seed, stage_report)
    for arm_name, arm in recipe.arms_of(model).items():
        folder = arm_folder(recipe, model, arm_name, seed)
        start = base
        if arm.kind in ("statex", "control"):
            start = folder / "expanded"
            with main_process_first():
                if not start.exists():
                    stage_report(f"expand {arm_name}")
                    expand_folder(base, start, arm, seed)
        if arm.kind != "base":
            _train_arm(recipe, arm_name, seed, start, folder, stage_report(f"train {arm_name}"))
        if evaluation and _is_main_process() and not (folder / "results.jsonl").exists():
            trained = start if arm.kind == "base" else folder / "trained"
            _evaluate_arm(recipe, model, arm_name, seed, trained, folder, stage_report)
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
    """Every arm's results, the comparison of arms, and the versions that were run."""
    from statex.evaluation.compare import compare_arms

    commit = source_commit()
    results = [Result(suite="run", metric="versions", value=0.0, commit=commit, details=versions())]
    for model in recipe.models:
        folders = {
            (arm, seed): arm_folder(recipe, model, arm, seed)
            for arm in recipe.arms_of(model)
            for seed in recipe.seeds
        }
        rows = [row for folder in folders.values() for row in read_results(folder / "results.jsonl")]
        device = next((row.device for row in rows if row.device), "")
        evaluated = {key: folder / "evaluation" for key, folder in folders.items()}
        baselines = [arm for arm, settings in recipe.arms_of(model).items() if settings.kind == "lpt"]
        results += rows + compare_arms(
            evaluated, baseline=baselines[0] if baselines else "lpt", model=model, device=device, commit=commit
        )
    return results


def arm_folder(recipe: Recipe, model: str, arm: str, seed: int) -> Path:
    """Where one arm of one model and seed is kept."""
    return recipe.folder / model / f"{arm}-seed{seed}"


def _base_model(recipe: Recipe, model: str, seed: int, stage_report: Callable) -> Path:
    """The folder of the checkpoint a chain starts from; pre-trained first where the recipe makes it from scratch."""
    section = recipe.models[model]
    if section.checkpoint is not None:
        return Path(section.checkpoint)
    folder = recipe.folder / model / f"pretrained-seed{seed}"
    if not (folder / "training.json").exists():
        from transformers import AutoTokenizer, set_seed

        from statex.models.scratch import make_model
        from statex.training.trainer import train

        progress = stage_report("pre-train")
        tokenizer = AutoTokenizer.from_pretrained(recipe.folder / "tokenizer")
        set_seed(seed)
        network = make_model(section.family, section.config, tokenizer)
        if section.pretraining is None:
            raise UserError(f"models.{model}.pretraining", None, "is missing", "say how the model is pre-trained")
        summary = train(
            network, tokenizer, recipe.data, section.pretraining, folder, seed=seed, progress=progress
        )  # fmt: skip
        _write_json(folder / "training.json", summary.to_dict())
    return folder / "trained"


def _train_arm(recipe: Recipe, arm: str, seed: int, start: Path, folder: Path, progress: Callable) -> None:
    if (folder / "training.json").exists():
        return
    import torch
    from transformers import AutoTokenizer

    from statex.checkpoint import load
    from statex.training.trainer import train

    network = load(start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(start)
    training = recipe.arm_training(arm)
    summary = train(network, tokenizer, recipe.data, training, folder, seed=seed, progress=progress)
    _write_json(folder / "training.json", summary.to_dict())


def _evaluate_arm(
    recipe: Recipe, model: str, arm: str, seed: int, trained: Path, folder: Path, stage_report: Callable
) -> None:
    """Evaluate one trained arm; its figures, its state and what it cost go to `folder/results.jsonl`."""
    import torch
    from transformers import AutoTokenizer

    from statex.checkpoint import load
    from statex.evaluation.runner import evaluate
    from statex.expansion.plan import stored_plan
    from statex.expansion.state import state_report

    network = load(trained)
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    state = state_report(network)
    facts: dict[str, Any] = {
        "model": model,
        "arm": arm,
        "seed": seed,
        "state_bytes": state.total_bytes,
        "device": device_name(network.device),
        "commit": source_commit(),
    }
    watch = Stopwatch(network.device)
    results = evaluate(
        network,
        AutoTokenizer.from_pretrained(trained),
        recipe.evaluation,
        output=folder / "evaluation",
        text=recipe.evaluation.text or recipe.data.text,
        count_text=recipe.data.text,
        training_length=recipe.training.sequence_length,
        shared=recipe.folder / "shared",
        progress=lambda suite, done, total: stage_report(f"evaluate {arm}: {suite}")(done, total),
        identity=facts,
    )
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
    results.append(Result("cost", "seconds", watch.seconds(), "s", n=1, slice={"stage": "evaluate"}, **facts))
    write_results(folder / "results.jsonl", results)


def _cost_results(folder: Path, facts: dict[str, Any]) -> Iterator[Result]:
    """What training cost, from training.json; nothing for an arm that was not trained."""
    path = folder / "training.json"
    if not path.exists():
        return
    summary = json.loads(path.read_text(encoding="utf-8"))
    yield Result("cost", "training_tokens_per_second", summary["tokens_per_second"], "tokens/s", n=1, **facts)
    yield Result("cost", "training_peak_memory", summary["peak_memory"], "bytes", n=1, **facts)
    yield Result("cost", "seconds", summary["seconds"], "s", n=1, slice={"stage": "train"}, **facts)


def _ensure_tokenizer(recipe: Recipe) -> None:
    """Train the recipe's tokenizer where a model is made from scratch and it is not there yet."""
    folder = recipe.folder / "tokenizer"
    if folder.exists() or all(section.family is None for section in recipe.models.values()):
        return
    from accelerate import PartialState

    from statex.checkpoint import new_folder
    from statex.data.tokenizer import train_tokenizer

    with PartialState().main_process_first():
        if not folder.exists():
            tokenizer = train_tokenizer(recipe.data.text, recipe.data.tokenizer, recipe.data.recall)
            with new_folder(folder) as temporary:
                tokenizer.save_pretrained(temporary)


def _run_in_processes(recipe: Recipe, chains: list[tuple[str, int]], evaluation: bool, report: Report) -> None:
    """Run the chains `workers` at a time, each with its share of the cores; what they report is shown here."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, _environment("OMP_NUM_THREADS", str(_threads_of(recipe.workers))):
        events = manager.Queue()
        with ProcessPoolExecutor(min(recipe.workers, len(chains)), mp_context=context) as pool:
            futures = [pool.submit(_chain_in_process, recipe, *chain, evaluation, events) for chain in chains]
            stop = threading.Event()
            reader = threading.Thread(target=_show, args=(events, report, stop), daemon=True)
            reader.start()
            try:
                _wait_for(futures)
            finally:
                stop.set()
                reader.join()


def _wait_for(futures: list[Future]) -> None:
    """Wait until all are done; at the first failure drop those that have not begun, and raise it."""
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    for future in done:
        future.result()


def _chain_in_process(recipe: Recipe, model: str, seed: int, evaluation: bool, events: Any) -> None:
    import torch

    torch.set_num_threads(_threads_of(recipe.workers))
    run_chain(recipe, model, seed, evaluation, lambda *event: events.put(event))


def _show(events: Any, report: Report, stop: threading.Event) -> None:
    while not (stop.is_set() and events.empty()):
        try:
            report(*events.get(timeout=0.2))
        except queue.Empty:
            continue


def _threads_of(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _quiet() -> None:
    """Leave the terminal to our own progress: no bars for each file that transformers or datasets read."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    if _is_main_process():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two recipes the same run: all but where it is kept and how many processes share the work."""
    return recipe.model_dump(mode="json", exclude={"workers", "output"})


def _first_difference(before: Any, now: Any, key: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                return _first_difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    return key
