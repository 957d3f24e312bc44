"""What verbs print: results to standard output, complaints to standard error."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console


def done(folder: Path, as_json: bool, message: str) -> None:
    """Say where the result is; under torchrun, only once."""
    from statex.run.launch import is_main_process

    if is_main_process():
        print_json({"folder": str(folder)}) if as_json else print(message)


def show_summary(folder: Path) -> None:
    """The verdict of a run and its arms in a table, on the terminal."""
    from statex.reporting.terminal import summary

    console = Console()
    for part in summary(folder):
        console.print(part, highlight=False)


def show_unfinished(folders: Iterable[str]) -> None:
    """What runs lack that are not finished, on the terminal."""
    from statex.reporting.run import read_run
    from statex.reporting.verdict import unfinished_sentences
    from statex.utils.markup import plain

    for folder in folders:
        print("\n" + "\n".join([f"{folder}:", *map(plain, unfinished_sentences(read_run(Path(folder))))]))


def print_results(measured: Any) -> None:
    """Results as a table, then the tasks that were not run, each with the command that fetches what it lacks."""
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


def print_costs(found: list[Any], tokens_per_second: float | None, dollars: float | None) -> None:
    """The cost of each training stage as a table, and what the estimate is based on."""
    from rich.table import Table

    from statex.run.cost import MFU, PRODUCT_PER_SECOND

    console = Console()
    if not console.is_terminal:
        console.width = 200
    counts = sorted({gpus for each in found for gpus in each.memory})
    memory = [f"GB on {gpus}" for gpus in counts]
    table = Table(
        "model", "arm", "parameters", "state", "steps", "tokens", "operations", *memory, "GPU hours", "dollars"
    )
    for each in found:
        price = "-" if dollars is None else f"{dollars * each.hours:,.2f}"
        table.add_row(
            each.model, each.arm or "pre-training", f"{each.parameters:,}", f"{each.state:,}", f"{each.steps:,}",
            f"{each.tokens:,}", f"{each.operations:.2e}", *(_gigabytes(each.memory.get(gpus)) for gpus in counts),
            f"{each.hours:,.2f}", price,
        )  # fmt: skip
    console.print(table)
    hours = sum(each.hours for each in found)
    total = "" if dollars is None else f", {dollars * hours:,.2f} dollars"
    given = f"{MFU:.0%} of {PRODUCT_PER_SECOND / 1e12:.0f} TFLOP/s, as 1.3B models reach on an H200; smaller ones less"
    if tokens_per_second is not None:
        given = f"{tokens_per_second:,.0f} tokens/s on one GPU"
    console.print(
        f"{hours:,.2f} GPU hours for all seeds{total}, at {given}. Evaluation is not counted.", highlight=False
    )


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.1f}"


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def no_space(error: OSError) -> str:
    """What to do where the disk is full; the error's own message is added where it is unusual."""
    where = error.filename if error.filename is not None else "a folder that the error does not name"
    words = f" ({error.strerror})" if error.strerror != os.strerror(errno.ENOSPC) else ""
    return f"no space left in {where}; free some space, then the same command resumes{words}"


def complain(error: object) -> None:
    """Print an error on standard error."""
    Console(stderr=True).print(f"statex: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
