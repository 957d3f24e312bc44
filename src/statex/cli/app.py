"""The command `statex` itself: its verbs in the order of its help, its version, and what it says at start-up."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from statex.cli.measuring import bench, evaluate, report
from statex.cli.verbs import expand, inspect, prepare, run, train

app = typer.Typer(
    name="statex",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(no_args_is_help=True, help="The text that models are trained on.")

VERBS: dict[str, Callable[..., None]] = {
    "inspect": inspect, "expand": expand, "train": train, "run": run, "eval": evaluate, "bench": bench, "report": report
}  # fmt: skip
for name, verb in VERBS.items():
    app.command(name)(verb)
data_app.command("prepare")(prepare)
app.add_typer(data_app, name="data")


def show_version(wanted: bool) -> None:
    """Print the version of statex and those it was tested with, and stop."""
    if wanted:
        from statex import __version__
        from statex.utils.environment import describe_versions

        print(f"statex {__version__}, {describe_versions()}")
        raise typer.Exit


LONG_VERBS = ("train", "eval", "bench", "run", "data")
"""Verbs that print at start-up which versions they run with."""


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

    Exit status: 0 done, 1 failure, 2 a mistake in the request.
    """
    from statex import __version__
    from statex.run.launch import is_main_process
    from statex.utils.environment import describe_versions, warn_untested

    if is_main_process():
        if context.invoked_subcommand in LONG_VERBS:
            line = f"statex {__version__}, {describe_versions()}"
            Console(stderr=True).print(line, style="dim", highlight=False, soft_wrap=True)
        warn_untested()
