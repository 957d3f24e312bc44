"""What verbs print: results to standard output, complaints to standard error."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console


def done(folder: Path, as_json: bool, message: str) -> None:
    """Say where the result is; under torchrun once."""
    from statex.run.launch import is_main_process

    if is_main_process():
        print_json({"folder": str(folder)}) if as_json else print(message)


def show_summary(folder: Path) -> None:
    """The verdict of a run and its arms in a table, on the terminal."""
    from statex.reporting.terminal import summary

    console = Console()
    for part in summary(folder):
        console.print(part, highlight=False)


def print_results(measured: Any) -> None:
    """Results as a table, and what was not run with the command that fetches what it lacks."""
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width of its own
    table = Table("suite", "metric", "slice", "value", "95 % interval", "n", "note")
    for row in measured.results:
        where = ", ".join(f"{key} {value}" for key, value in row.slice.items())
        interval = f"[{row.low:.4g}, {row.high:.4g}]" if row.low is not None and row.high is not None else ""
        n = "" if row.n is None else str(row.n)
        table.add_row(row.suite, row.metric, where, f"{row.value:.4g} {row.unit}", interval, n, row.note)
    if measured.results:
        console.print(table)
    for one in measured.not_run:
        text = f"not run: {one.task} ({one.reason})\n    {one.command}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def no_space(error: OSError) -> str:
    """What to do where the disk is full; the words of the error are added where they are not the usual ones."""
    where = error.filename if error.filename is not None else "a folder that the error does not name"
    words = f" ({error.strerror})" if error.strerror != os.strerror(errno.ENOSPC) else ""
    return f"no space left in {where}; make room, the same command resumes{words}"


def complain(error: object) -> None:
    """Say on standard error what went wrong."""
    Console(stderr=True).print(f"statex: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
