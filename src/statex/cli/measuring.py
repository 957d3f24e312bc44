"""The verbs that measure and report: eval, bench and report."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statex.cli.options import (
    BatchSize,
    DataFolder,
    Json,
    Limit,
    ModelPath,
    OutOfScores,
    Override,
    PromptLengths,
    Suites,
    evaluation_overrides,
    model_name,
)
from statex.cli.output import complain, print_json, print_results, show_unfinished
from statex.errors import UserError
from statex.results.suites import SUITES


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

    Groups of lm-eval's tasks, with `pip install 'statex[eval]'`; any other of its tasks may also be named:

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


def bench(
    what: Annotated[
        Literal["ops", "model", "training"],
        typer.Argument(help="ops: the recurrences. model: reading and generating. training: whole training steps."),
    ],
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; default: all that fit the device.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write JSON (of a sweep also a figure) to this folder.")] = None,
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
        typer.Option(metavar="JSON", help="Measure nothing: redraw the figure of a sweep's JSON file, next to it."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="training.KEY=VALUE", help="Training steps only: change a key of the section."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the recurrences, whole models or training steps beside their peers, correctness first, on this device.

    Example: `statex bench ops --out benchmarks/out`

    How cost grows, with a figure: `statex bench ops --sweep state --out benchmarks/out`

    A key of training changed: `statex bench training --case gla-45m-2k --set training.residual_precision=bf16`
    """
    for option, value in {"--sweep": sweep, "--peers": peers, "--redraw": redraw}.items():
        if what != "ops" and value is not None:
            raise UserError(option, str(value), "applies to the recurrences only", "use `statex bench ops`")
    changes = _training_changes(what, overrides or [])
    if redraw is not None:
        figure = _draw_sweep(redraw)
        print_json({"figure": figure}) if as_json else print(figure)
        return
    from statex.benchmarking import run_model_benchmark, run_ops_benchmark, run_training_benchmark
    from statex.benchmarking.ops import records_file
    from statex.utils.atomic import working_in

    with working_in(out, "--out") if out is not None else nullcontext():
        if what == "model":
            rows = run_model_benchmark(cases=case, out=out)
        elif what == "training":
            rows = run_training_benchmark(cases=case, out=out, changes=changes)
        else:
            rows = run_ops_benchmark(cases=case, out=out, sweep=sweep, peers=peers)
    if as_json:
        print_json(rows)
    if sweep is not None and out is not None:
        figure = _draw_sweep(out / records_file(sweep))
        if not as_json:
            print(figure)


def _draw_sweep(records: Path) -> str:
    """Draw the figure of a sweep's JSON file next to it; its path."""
    from statex.reporting.sweep import write_sweep  # only here: it needs matplotlib

    return str(write_sweep(records))


def _training_changes(what: str, overrides: list[str]) -> dict[str, Any]:
    """What --set changes of the section `training`."""
    from statex.recipe import apply_override

    values: dict[str, Any] = {"training": {}}
    for override in overrides:
        if what != "training":
            raise UserError("--set", override, "applies to training steps only", "use `statex bench training`")
        if not override.startswith("training."):
            raise UserError("--set", override, "is not a key of the section training", "set training.KEY=VALUE")
        apply_override(values, override)
    return values["training"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of `statex run` or `statex eval`.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page. Default: the run's own; for several runs, runs/comparison."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html and report.md of one run or evaluated model, or one page about several.

    Of a run that is not finished, what is finished is reported, with a list of what is missing.

    Example: `statex report runs/demo`
    """
    from dataclasses import asdict

    from statex.reporting.page import write_comparison, write_report
    from statex.run.collect import collect_unfinished

    missing = {str(folder): left for folder in runs if (left := collect_unfinished(folder))}
    html, markdown = (
        write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out or Path("runs/comparison"))
    )
    if as_json:
        found = {folder: [asdict(one) for one in left] for folder, left in missing.items()}
        print_json({"html": str(html), "markdown": str(markdown)} | ({"unfinished": found} if found else {}))
    else:
        print(f"{html}\n{markdown}")
        show_unfinished(missing)


def measure_folder(model: str, sections: Any, folder: Path) -> Any:
    """Load a model and measure it by the sections of a recipe; its results are merged into those in `folder`."""
    import torch

    from statex.checkpoint import load, load_tokenizer
    from statex.evaluation import Request, measure_model
    from statex.expansion.state import state_report
    from statex.results import merge_results
    from statex.run.progress import Display
    from statex.utils.atomic import working_in
    from statex.utils.environment import default_device

    tokenizer = load_tokenizer(model)
    dtype = sections.evaluation.dtype
    network: Any = load(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    network = network.to(device=default_device()).eval()
    identity = {
        "model": model,
        "state_bytes": state_report(network).total_bytes,
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    with working_in(folder, "output"), Display() as display:
        request = Request(
            sections.evaluation,
            output=folder,
            text=sections.evaluation.text or sections.data.text,
            count_text=sections.data.text,
            progress=lambda name, finished, total: display.update(Path(model).name, name, finished, total),
            identity=identity,
        )
        measured = measure_model(network, tokenizer, request)
        merge_results(folder / "results.jsonl", measured.results)
    return measured
