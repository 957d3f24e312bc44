"""The verbs that make models: inspect, expand, train, run, and `data prepare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from statex.cli.options import (
    Json,
    ModelPath,
    OfArms,
    OfModels,
    OfSeeds,
    Override,
    RecipePath,
    expansion_config,
    parse_numbers,
)
from statex.cli.output import done, print_costs, print_json, show_summary
from statex.errors import UserError


def inspect(model: ModelPath, as_json: Json = False) -> None:
    """Show a model's family, size, recurrent state and how it could be expanded; reads headers, no weights.

    Example: `statex inspect models/gla-1.3B`
    """
    from statex.checkpoint import inspect as inspect_folder

    found = inspect_folder(model)
    if as_json:
        print_json(found.to_dict())
        return
    table = {
        "model": found.folder,
        "model type": found.model_type,
        "parameters": f"{found.num_parameters:,}",
        "dtype": ", ".join(found.dtypes),
        "expansion": found.expansion or "none",
    }
    print("\n".join(f"{name:<12}{value}" for name, value in table.items()))
    print("\nrecurrent state at batch 1, fp32\n")
    print(found.state)
    print("\nhow every 6th recurrent layer could be expanded\n")
    print("\n".join(f"{possible.init:<12}{possible}" for possible in found.possible))


def expand(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder; must not exist.")],
    preset: Annotated[
        str | None, typer.Option(help="paper-gla, paper-mamba2 or paper-mamba2-code; excludes the options below.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Expand every k-th recurrent layer, from the first on.")] = None,
    layers: Annotated[str | None, typer.Option(help="Expand these layers, for example 0,6,12,18.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Expand n layers, evenly spaced.")] = None,
    factor: Annotated[
        int | None, typer.Option(help="Factor of a layer's state. Default: all heads (GLA) or 4 (all others).")
    ] = None,
    method: Annotated[
        Literal["grow", "merge"] | None,
        typer.Option(help="grow: more keys in each head. merge: one head of several. Default: the family's own."),
    ] = None,
    init: Annotated[
        Literal["reinit", "inherit", "preserve"] | None,
        typer.Option(help="reinit: fresh mixers (the paper). inherit: old weights. preserve: the same function."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="GLA with preserve: new rows as a product of this rank.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the fresh parameters.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; reads headers, no weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Enlarge the recurrent state of some layers and write the model, with its tokenizer, to OUT.

    Example: `statex expand models/gla-1.3B models/gla-1.3B-statex --preset paper-gla`

    Example: `statex expand models/mamba2 models/mamba2-x4 --num-layers 8 --factor 4 --init preserve`
    """
    from statex.checkpoint import load, load_config, save_with_companions
    from statex.expansion.plan import plan_expansion
    from statex.expansion.state import state_report
    from statex.models.expanded import expand as expand_model
    from statex.utils.atomic import check_new_folder, working_in

    fields = {
        "every": every, "layers": parse_numbers("--layers", layers), "num_layers": num_layers, "factor": factor,
        "method": method, "init": init, "rank": rank, "seed": seed,
    }  # fmt: skip
    config = expansion_config(preset, {name: value for name, value in fields.items() if value is not None})
    check_new_folder(out)
    if dry_run:
        plan = plan_expansion(load_config(model), config)
        print_json(plan.to_dict()) if as_json else print(plan)
        return
    with working_in(out, "OUT"):
        network = load(model)
        plan = expand_model(network, config)
        save_with_companions(network, model, out)
    report = state_report(network)
    if as_json:
        print_json({"out": str(out), "plan": plan.to_dict(), "state": report.to_dict()})
    else:
        print(f"{plan}\n\n{report}\n\nwritten to {out}")


def train(
    recipe: RecipePath,
    model: OfModels = None,
    arm: OfArms = None,
    seed: OfSeeds = None,
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Pre-train, expand and post-train all arms and seeds of a recipe; resumes where an earlier call stopped.

    Example: `statex train recipes/demo.toml --set training.steps=200`

    On several GPUs: `torchrun --nproc-per-node 8 -m statex train RECIPE`

    As one of several jobs that share the run: `statex train RECIPE --model gla --arm lpt --seed 0`
    """
    from statex.recipe import load_recipe
    from statex.run import Selection, run_recipe

    selection = Selection(model or (), arm or (), seed or ())
    folder = run_recipe(load_recipe(recipe, overrides or []), selection, evaluation=False)
    done(folder, as_json, f"trained models in {folder}")


def run(
    recipe: RecipePath,
    model: OfModels = None,
    arm: OfArms = None,
    seed: OfSeeds = None,
    overrides: Override = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and estimate what its training takes; write nothing.")
    ] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-3, help="Of one GPU, for the hours of a dry run. Default: an estimate.")
    ] = None,
    dollars: Annotated[float | None, typer.Option(min=0, help="Price of a GPU hour, for a dry run.")] = None,
    as_json: Json = False,
) -> None:
    """Run all stages of a recipe: train every arm and seed, evaluate, compare, report. Resumes where it stopped.

    Example: `statex run recipes/demo.toml --set seeds=[0,1,2]`

    What it will take: `statex run recipes/demo.toml --dry-run`

    As one of several jobs that share the run: `statex run RECIPE --model gla --arm lpt --arm preserve`. The last one
    to finish writes the report.
    """
    from statex.recipe import load_recipe
    from statex.run import Selection, run_recipe, unfinished_stages
    from statex.run.launch import is_main_process

    resolved, selection = load_recipe(recipe, overrides or []), Selection(model or (), arm or (), seed or ())
    for option, value in {"--tokens-per-second": tokens_per_second, "--dollars": dollars}.items():
        if value is not None and not dry_run:
            raise UserError(option, value, "applies to a dry run only", "add --dry-run, or leave it out")
    if dry_run:
        from statex.run.cost import costs

        found = costs(resolved, selection, tokens_per_second=tokens_per_second)
        print_json([each.to_dict() for each in found]) if as_json else print_costs(found, tokens_per_second, dollars)
        return
    folder = run_recipe(resolved, selection)
    if not is_main_process():
        return
    if left := unfinished_stages(resolved):
        done(folder, as_json, f"no report yet: {len(left)} stages of other selections are not finished in {folder}")
        return
    done(folder, as_json, f"report: {folder / 'report.html'}")
    if not as_json:
        show_summary(folder)


def prepare(recipe: RecipePath, overrides: Override = None, as_json: Json = False) -> None:
    """Tokenise the training text of a recipe, once, as far as its runs read it. Resumes where it stopped.

    `statex run` and `statex train` do this by themselves; do it beforehand on a machine without GPUs, or once for many
    jobs that start together. The folder is `tokens` beside the runs, or the recipe's `data.tokens`.

    Example: `statex data prepare recipes/paper-gla-1.3b.toml`
    """
    from rich.table import Table

    from statex.recipe import load_recipe
    from statex.run import prepare_text

    prepared = prepare_text(load_recipe(recipe, overrides or []))
    if as_json:
        facts = ("folder", "num_tokens", "num_documents", "is_whole")
        print_json({model: {name: getattr(found, name, None) for name in facts} for model, found in prepared.items()})
        return
    table = Table("model", "tokens", "documents", "the whole text", "folder")
    for model, found in prepared.items():
        if found is None:
            table.add_row(model, "0", "0", "", "its training reads no text")
            continue
        whole = "yes" if found.is_whole else "as far as needed"
        table.add_row(model, f"{found.num_tokens:,}", f"{found.num_documents:,}", whole, str(found.folder))
    Console().print(table)
