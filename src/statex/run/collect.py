"""All arms of a run put together: their results, the comparison of arms, and the report."""

from statex.recipe import Recipe
from statex.results import Result, read_results, write_results
from statex.run.measuring import DIAGNOSTICS, RESULTS
from statex.run.selection import chains_of
from statex.run.stages import Stage, arm_folder, measuring_stages, training_stages
from statex.utils.environment import source_commit, versions


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
