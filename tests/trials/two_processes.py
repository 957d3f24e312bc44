"""Starts two processes on one run: `python tests/trials/two_processes.py [ROUNDS]`; prints what came of it.

One must do the run and the other be refused with status 2. In every second round the first is killed, after which the
second command must resume.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_recipe import TRAINING, run_statex
from trials.common import STATEX, end_all, start, write_run

REFUSED = "another process works in it"


def two(folder: Path, delay: float, kill: bool) -> str:
    """What came of two processes, the second begun `delay` seconds after the first."""
    recipe = short_run(folder)
    processes = []
    for _ in range(2):
        processes.append(start(STATEX, "train", recipe))
        time.sleep(delay)
    try:
        if kill:
            os.kill(processes[0][0].pid, signal.SIGKILL)
        ended = [(process.communicate(timeout=300)[1], process.returncode) for process, _ in processes]
    finally:
        for _, mark in processes:
            end_all(mark)
    again = run_statex("train", recipe)
    if again.returncode:
        return f"does not resume: {again.stderr[-1000:]}"
    if list(folder.rglob(".*")):
        return "something half-written is left"
    codes = sorted(code for _, code in ended)
    refused = sum(REFUSED in errors for errors, _ in ended)
    if kill and codes[0] == -signal.SIGKILL and codes[1] in (0, 2):
        return "killed, resumed"
    if codes == [0, 2] and refused == 1:
        return "one refused"
    return "one after the other" if codes == [0, 0] else f"status {codes}: {ended}"


def short_run(folder: Path) -> Path:
    """A recipe that takes some seconds."""
    model = {"family": "mamba2", "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8,
             "state_size": 8, "n_groups": 2}, "pretraining": TRAINING | {"steps": 60}}  # fmt: skip
    return write_run(folder, models={"mamba2": model})


def main(rounds: int = 10) -> int:
    choose = random.Random(0)
    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[two(Path(folder), choose.uniform(0.0, 1.0), kill=number % 2 == 1)] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return rounds - sum(outcomes[good] for good in ("one refused", "one after the other", "killed, resumed"))


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
