"""What the trials share: a small run that takes long enough to be stopped, and the processes that it left."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_recipe import CONFIGS, EVALUATION, TRAINING, data_values, environment, write_recipe, write_text

STATEX = [sys.executable, "-m", "statex"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "statex"]
MARK = "STATEX_TRIAL"
"""The environment variable that marks the processes of a trial, those that they start included."""


def write_run(folder: Path, output: Path | None = None, **changes: Any) -> Path:
    """A recipe, with all it needs in `folder`, that pre-trains two models for a long time; returns its path."""
    pretraining = TRAINING | {"steps": 100_000, "save_every": 5, "sequences_per_device": 2}
    values = {
        "name": "run", "output": str(output or folder / "runs"),
        "models": {
            family.removeprefix("statex_"): {"family": family, "config": config, "pretraining": pretraining}
            for family, config in CONFIGS.items()
        },
        "arms": {"lpt": {"kind": "lpt"}}, "training": TRAINING, "data": data_values(write_text(folder / "text")),
        "evaluation": EVALUATION,
    }  # fmt: skip
    return write_recipe(folder / "recipe.toml", values | changes)


def checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of all stages under `output`."""
    return sorted(output.rglob("checkpoint-*/files.json"))


def start(command: list[str], *arguments: str | Path) -> tuple[subprocess.Popen[str], str]:
    """A process in a session of its own, without a GPU, and the mark of all that it starts."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(**{MARK: mark, "CUDA_VISIBLE_DEVICES": ""}), start_new_session=True,
    )  # fmt: skip
    return process, mark


def processes(mark: str) -> list[int]:
    """The processes of a trial that are running."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended, or another user's
            continue
    return found


def wait_until(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether the condition comes true in so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def end_all(mark: str) -> None:
    """End what a failed trial left."""
    for process in processes(mark):
        os.kill(process, 9)
