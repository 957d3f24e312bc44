"""The verbs of the command line, a function each."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from statex.cli.measuring import measure_folder
from statex.cli.options import (
    BatchSize,
    DataFolder,
    Json,
    Limit,
    ModelPath,
    OfArms,
    OfModels,
    OfSeeds,
    OutOfScores,
    Override,
    PromptLengths,
    RecipePath,
    Suites,
    evaluation_overrides,
    expansion_config,
    model_name,
    parse_numbers,
)
from statex.cli.output import complain, done, print_costs, print_json, print_results, show_summary
from statex.errors import UserError
from statex.results.suites import SUITES

app = typer.Typer(
    name="statex",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(no_args_is_help=True, help="The text that models are trained on.")
app.add_typer(data_app, name="data")


def show_version(wanted: bool) -> None:
    """Print the version of statex and those it was tested with, and stop."""
    if wanted:
        from statex import __version__
        from statex.utils.environment import describe_versions

        print(f"statex {__version__}, {describe_versions()}")
        raise typer.Exit


LONG_VERBS = ("train", "eval", "bench", "run", "data")
"""They say at start-up with which versions they run."""


@app.callback()
def statex(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the versions in use and those tested."
        ),
    ] = False,
) -> None:
    """Enlarge the recurrent state of a pre-trained language model, post-train it, measure what it gained and cost.

    A whole comparison from one file:

        statex run recipes/demo.toml

    Step by step, on your own model:

        statex inspect MODEL
        statex expand MODEL OUT --every 6
        statex eval OUT

    Exit status: 0 done, 1 failure, 2 a mistake in what was asked.
    """
    from statex import __version__
    from statex.run.launch import is_main_process
    from statex.utils.environment import describe_versions, warn_untested

    if is_main_process():
        if context.invoked_subcommand in LONG_VERBS:
            line = f"statex {__version__}, {describe_versions()}"
            Console(stderr=True).print(line, style="dim", highlight=False, soft_wrap=True)
        warn_untested()


@app.command()
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


@app.command()
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
        int | None, typer.Option(help="Growth of a layer's state. Default: all heads (GLA) or 4 (all others).")
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


@app.command()
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


@app.command()
def run(
    recipe: RecipePath,
    model: OfModels = None,
    arm: OfArms = None,
    seed: OfSeeds = None,
    overrides: Override = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and say what its training takes; write nothing.")
    ] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-3, help="Of one GPU, for the hours of a dry run. Default: by arithmetic.")
    ] = None,
    dollars: Annotated[float | None, typer.Option(min=0, help="Of an hour of a GPU, for a dry run.")] = None,
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
            raise UserError(option, value, "is of a dry run", "add --dry-run, or leave it out")
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


@data_app.command()
def prepare(recipe: RecipePath, overrides: Override = None, as_json: Json = False) -> None:
    """Tokenise the training text of a recipe, once and as far as its runs read it. Resumes where it stopped.

    `statex run` and `statex train` do it by themselves; do it beforehand on a machine without GPUs, or once for many
    jobs that begin together. The folder is `tokens` beside the runs, or the recipe's `data.tokens`.

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
        whole = "yes" if found.is_whole else "as far as it is read"
        table.add_row(model, f"{found.num_tokens:,}", f"{found.num_documents:,}", whole, str(found.folder))
    Console().print(table)


@app.command(name="eval")
def evaluate(
    model: ModelPath,
    suite: Suites = None,
    out: OutOfScores = None,
    limit: Limit = None,
    lengths: PromptLengths = None,
    batch_size: BatchSize = None,
    data: DataFolder = None,
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Measure recall, text and cost of a model; resumes where it stopped.

    Suites, which need no network and no recipe; `offline` stands for all of them: {suites}.

    Groups of lm-eval's tasks, with `pip install 'statex[eval]'`; any other of its tasks may be named too:

    - recall: SWDE, FDA, SQuAD, and open-book TriviaQA, NQ and DROP

    - common-sense: PIQA, HellaSwag, WinoGrande, ARC, SIQA

    - long-context: RULER's needles, variable tracking and words

    - icl: TREC, BANKING77 and CLINC150 with 16 to 512 shots

    - generalisation: GSM8K, HumanEval, MBPP, CoQA

    - statex: our suites in lm-eval's form

    A task whose data is not on this machine is not run, and the command that fetches it is shown.

    Example: `statex eval runs/demo/gla/preserve-seed0/trained --suite mqar --set evaluation.mqar.num_items=500`

    Example: `statex eval MODEL --suite offline --suite recall --suite piqa --limit 100`
    """
    from dataclasses import asdict

    from statex.evaluation import check_names
    from statex.recipe import evaluation_sections

    settings = evaluation_overrides(limit, lengths, batch_size, data)
    sections = evaluation_sections([*settings, *(overrides or [])], suites=suite or ["offline"])
    check_names(sections.evaluation.suites)
    if not sections.evaluation.suites:
        raise UserError("evaluation.suites", [], "names nothing to measure", "name a suite with --suite")
    folder = out or Path("runs") / "eval" / model_name(model)
    measured = measure_folder(model, sections, folder)
    if as_json:
        rows, missing = ([asdict(one) for one in some] for some in (measured.results, measured.not_run))
        print_json({"results": rows, "not_run": missing})
    else:
        print_results(measured)
        print(f"\nscores of every item: {folder}")
    if not measured.results:
        complain("nothing could be run: the data of every task is missing")
        raise typer.Exit(1)


evaluate.__doc__ = (evaluate.__doc__ or "").format(suites=", ".join(SUITES))


@app.command()
def bench(
    what: Annotated[
        Literal["ops", "model", "training"],
        typer.Argument(help="ops: the recurrences. model: reading and generating. training: whole training steps."),
    ],
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; default: all that fit the device.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write JSON, of a sweep a figure too, to this folder.")] = None,
    sweep: Annotated[
        Literal["state", "tokens"] | None,
        typer.Option(help="Recurrences only: cost against the size of the state, or against the number of tokens."),
    ] = None,
    peers: Annotated[
        bool | None,
        typer.Option(
            "--peers/--no-peers",
            help="Recurrences only: measure other libraries too, where installed. Default: yes, but not in a sweep, "
            "as they tune themselves for minutes at each new shape.",
        ),
    ] = None,
    redraw: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Measure nothing: draw again the figure of a sweep's JSON file, beside it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the recurrences, whole models or training steps beside their peers, correctness first, on this device.

    Example: `statex bench ops --out benchmarks/out`

    How cost grows, with a figure: `statex bench ops --sweep state --out benchmarks/out`
    """
    for option, value in {"--sweep": sweep, "--peers": peers, "--redraw": redraw}.items():
        if what != "ops" and value is not None:
            raise UserError(option, str(value), "is of the recurrences", "use `statex bench ops`")
    if redraw is not None:
        from statex.reporting.sweep import write_sweep

        figure = write_sweep(redraw)
        print_json({"figure": str(figure)}) if as_json else print(figure)
        return
    from statex.benchmarking import run_model_benchmark, run_ops_benchmark, run_training_benchmark
    from statex.benchmarking.ops import records_file
    from statex.utils.atomic import working_in

    with working_in(out, "--out") if out is not None else nullcontext():
        if what == "model":
            rows = run_model_benchmark(cases=case, out=out)
        elif what == "training":
            rows = run_training_benchmark(cases=case, out=out)
        else:
            rows = run_ops_benchmark(cases=case, out=out, sweep=sweep, peers=peers)
    if as_json:
        print_json(rows)
    if sweep is not None and out is not None:
        from statex.reporting.sweep import write_sweep

        figure = write_sweep(out / records_file(sweep))
        if not as_json:
            print(figure)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of `statex run` or `statex eval`.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page. Default: the run's own; for several runs, runs/comparison."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html and report.md of one run or evaluated model, or one page about several.

    Example: `statex report runs/demo`
    """
    from statex.reporting.page import write_comparison, write_report

    html, markdown = (
        write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out or Path("runs/comparison"))
    )
    if as_json:
        print_json({"html": str(html), "markdown": str(markdown)})
    else:
        print(f"{html}\n{markdown}")
