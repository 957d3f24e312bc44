"""What a long job shows while it runs: a bar for each chain on a terminal, a line for each stage elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Shows stages of named chains: `with Display() as display: display.update("gla seed 0", "train lpt", 3, 800)`.

    Everything goes to standard error, so that `--json` keeps standard output to itself.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.fields[chain]:<24}"),
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.stages: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def update(self, chain: str, stage: str, done: int, total: int) -> None:
        """Chain `chain` is at `done` of `total` in `stage`."""
        if not self.console.is_terminal:
            self._print_stage(chain, stage)
            return
        if chain not in self.tasks:
            self.tasks[chain] = self.bars.add_task(stage, total=total, chain=chain)
        elif self.stages.get(chain, ("", 0.0))[0] != stage:
            self.bars.reset(self.tasks[chain], total=total, description=stage)
        self.stages[chain] = (stage, time.monotonic())
        self.bars.update(self.tasks[chain], completed=done, total=total, description=stage)

    def _print_stage(self, chain: str, stage: str) -> None:
        before, since = self.stages.get(chain, ("", 0.0))
        if stage == before:
            return
        now = time.monotonic()
        took = f"  ({before}: {now - since:.0f} s)" if before else ""
        self.console.print(f"[{chain}] {stage}{took}", markup=False, highlight=False, soft_wrap=True)
        self.stages[chain] = (stage, now)
