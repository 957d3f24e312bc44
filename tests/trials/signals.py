"""Sends signals to running trainings: `python tests/trials/signals.py [ROUNDS]`; prints what each kind came to.

A training must end with status 1 and say that the same command resumes, leave no process behind, and keep its
checkpoint. One that is killed cannot say anything, but must not leave its workers to train on.
"""

import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from trials.common import STATEX, TORCHRUN, checkpoints, end_all, processes, start, wait_until, write_run

MESSAGE = "statex: stopped; the same command resumes"
KINDS = {  # the command, its workers, the signal, and whether all its processes get it, as from a terminal
    "SIGTERM, one process": (STATEX, 1, signal.SIGTERM, False),
    "SIGHUP, one process": (STATEX, 1, signal.SIGHUP, False),
    "SIGTERM, workers": (STATEX, 2, signal.SIGTERM, False),
    "SIGHUP, workers": (STATEX, 2, signal.SIGHUP, True),
    "Ctrl-C, workers": (STATEX, 2, signal.SIGINT, True),
    "SIGKILL, workers": (STATEX, 2, signal.SIGKILL, False),
    "SIGTERM, torchrun": (TORCHRUN, 1, signal.SIGTERM, False),
    "SIGHUP, torchrun": (TORCHRUN, 1, signal.SIGHUP, False),
}


def stopped(kind: str, folder: Path) -> list[str]:
    """What was wrong with a training that was stopped as `kind` says; nothing, it is hoped."""
    command, workers, number, to_all = KINDS[kind]
    recipe = write_run(folder, workers=workers)
    if command is TORCHRUN:
        recipe.write_text(recipe.read_text().replace("save_every = 5", "save_every = 2"))
    process, mark = start(command, "train", recipe)
    try:
        if not wait_until(lambda: len({path.parts[-5] for path in checkpoints(folder / "runs")}) >= workers):
            return ["no checkpoint was written"]
        os.killpg(process.pid, number) if to_all else os.kill(process.pid, number)
        errors = process.communicate(timeout=60)[1]
        wrong = [] if wait_until(lambda: not processes(mark), 10) else ["processes were left"]
        if not checkpoints(folder / "runs"):
            wrong.append("the checkpoint is lost")
        if number != signal.SIGKILL:
            if process.returncode != 1:
                wrong.append(f"status {process.returncode}")
            if errors.count(MESSAGE) != 1:
                wrong.append(f"not said once: {errors[-2000:]}")
            if command is STATEX and "Traceback" in errors:
                wrong.append(f"a traceback: {errors[-2000:]}")
        return wrong
    finally:
        end_all(mark)


def main(rounds: int = 3) -> int:
    failures = 0
    for kind in KINDS:
        outcomes: Counter[str] = Counter()
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                outcomes["; ".join(stopped(kind, Path(folder))) or "as it should be"] += 1
        failures += rounds - outcomes["as it should be"]
        print(f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
