"""All arms of a run put together: their results, the comparison of arms, and the report."""

from dataclasses import asdict
from pathlib import Path

from statex.recipe import Recipe, load_recipe
from statex.results import Result, read_results, write_results
from statex.results.record import UNFINISHED, Unfinished, unfinished_arms_of
from statex.run.arms import CHANGED_KINDS
from statex.run.measuring import DIAGNOSTICS, RESULTS
from statex.run.selection import chains_of
from statex.run.stages import Diagnose, Evaluate, PreTrain, Stage, Train, measuring_stages, training_stages
from statex.utils.atomic import locked
from statex.utils.environment import source_commit, versions

DONE_BY = {PreTrain: "pre-trained", Train: "trained", Evaluate: "evaluated", Diagnose: "diagnosed"}
"""What an arm is after each stage."""


def unfinished_stages(recipe: Recipe) -> list[Stage]:
    """The stages of the whole recipe that are not finished, whichever call runs them."""
    stages = [
        stage
        for chain in chains_of(recipe)
        for stage in [*training_stages(recipe, chain), *measuring_stages(recipe, chain)]
    ]
    return [stage for stage in stages if not stage.is_finished()]


def write_collected(recipe: Recipe) -> None:
    """Write the run's results and its report."""
    from statex.reporting.page import write_report

    write_results(recipe.folder / RESULTS, collect_results(recipe))
    write_report(recipe.folder)


def collect_unfinished(folder: Path) -> list[Unfinished]:
    """Write the results of what is finished of a run that is not.

    A folder is left as it is where its results are whole or published, without the folders of its models, and where it
    is not a run's.

    Returns:
        The arms and seeds that the run lacks; none where it is finished.
    """
    if not (folder / "recipe.toml").is_file():
        return []
    results, recipe = folder / RESULTS, load_recipe(folder / "recipe.toml")
    lacked = unfinished_arms_of(read_results(results)) if results.is_file() else []
    if not any((folder / model).is_dir() for model in recipe.models):
        return lacked
    recipe = recipe.model_copy(update={"output": str(folder.absolute().parent), "name": folder.absolute().name})
    if results.is_file() and not lacked and not _is_measuring(recipe):
        return []
    with locked(folder, "run", wait=True):
        found = collect_results(recipe)
        write_results(results, found)
    return unfinished_arms_of(found)


def _is_measuring(recipe: Recipe) -> bool:
    """Whether the evaluation of an arm has begun and is not finished."""
    return any((one.folder / "evaluation").is_dir() and not one.is_finished() for one in _evaluations(recipe))


def unfinished_arms(recipe: Recipe) -> list[Unfinished]:
    """The arms and seeds that are not measured whole, each with the first stage that it lacks."""
    found = []
    for one in _evaluations(recipe):
        of_chain = recipe, one.model, one.seed
        stages: list[Stage] = [one]
        if not one.is_finished():  # else what it was made from may be gone, to save space
            pretrained = [PreTrain(*of_chain)] if recipe.models[one.model].pretraining is not None else []
            trained = [Train(*of_chain, one.arm)] if one.settings.kind != "base" else []
            stages = [*pretrained, *trained, one]
        if one.settings.kind in CHANGED_KINDS:
            stages.append(Diagnose(*of_chain, one.arm))
        lacked = next((stage for stage in stages if not stage.is_finished()), None)
        if lacked is not None:
            found.append(Unfinished(one.model, one.arm, one.seed, DONE_BY[type(lacked)]))
    return found


def _evaluations(recipe: Recipe) -> list[Evaluate]:
    """The evaluations of all models, arms and seeds."""
    return [
        Evaluate(recipe, model, seed, arm)
        for model in recipe.models
        for arm in recipe.arms_of(model)
        for seed in recipe.seeds
    ]


def collect_results(recipe: Recipe) -> list[Result]:
    """Every evaluated arm's results, the comparison of arms, the failures it shows, the versions that were run, and
    what is not finished."""
    from statex.evaluation.compare import compare_arms
    from statex.evaluation.diagnostics import combine_seeds, failure_signatures

    commit = source_commit()
    results = [Result(suite="run", metric="versions", value=0.0, commit=commit, details=versions())]
    if missing := unfinished_arms(recipe):
        details = {"arms": [asdict(one) for one in missing]}
        results.append(Result("run", UNFINISHED, len(missing), "arms and seeds", commit=commit, details=details))
    for model in recipe.models:
        finished = [one for one in _evaluations(recipe) if one.model == model and one.is_finished()]
        folders = {(one.arm, one.seed): one.folder for one in finished}
        files = [folder / name for folder in folders.values() for name in (RESULTS, DIAGNOSTICS)]
        rows = [row for path in files if path.exists() for row in read_results(path)]
        device = next((row.device for row in rows if row.device), "")
        evaluated = {key: folder / "evaluation" for key, folder in folders.items()}
        evaluated = {key: folder for key, folder in evaluated.items() if (folder / "items").is_dir()}
        baseline = next((arm for arm, settings in recipe.arms_of(model).items() if settings.kind == "lpt"), "lpt")
        expanded = [arm for arm, settings in recipe.arms_of(model).items() if settings.kind == "statex"]
        compared = compare_arms(evaluated, baseline=baseline, model=model, device=device, commit=commit)
        suites = {
            row.suite for row in rows
        }  # scores of suites that the recipe no longer names are kept, but not reported
        compared = [row for row in compared if row.suite in suites]
        results += rows + combine_seeds(rows) + compared + failure_signatures(compared, baseline, expanded)
    return results
