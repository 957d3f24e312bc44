"""Trains a recipe in processes that are killed (SIGKILL) in turn: `interrupted.py WHOLE INTERRUPTED SEED`.

First the recipe WHOLE is trained without interruption. Then processes train INTERRUPTED, which says the same, each
going on where the last was killed. Every second one is killed at a random moment of the first quarter of the time
that WHOLE took, the others when they are about to write, rename or remove their n-th file of the run, n at random: so
many are killed in the middle of saving. Ends after some kills, or when a process gets through; prints the number of
kills of either kind.

Processes are forked, for importing torch and transformers takes longer than the training.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from statex.recipe import load_recipe
from statex.run import prepare_text, run_recipe

WRITES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
MOST_KILLS = 6


def kill_at_write(number: int, folder: Path) -> None:
    """Have this process killed when it is about to change the folder for the n-th time."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        is_write = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_write and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_after(seconds: float) -> None:
    """Have this process killed some time from now."""

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def main(whole: str | Path, interrupted: str | Path, seed: int) -> None:
    prepare_text(load_recipe(whole))  # both runs read the same tokens; the time of this is not the training's
    start = time.monotonic()
    run_recipe(load_recipe(whole), evaluation=False)
    duration = time.monotonic() - start
    recipe, choose = load_recipe(interrupted), random.Random(seed)
    kills = [0, 0]
    while sum(kills) < MOST_KILLS:
        kind, number = sum(kills) % 2, choose.randint(1, 40)
        seconds = choose.uniform(0.0, duration / 4)
        child = os.fork()
        if child == 0:
            kill_at_write(number, recipe.folder) if kind == 0 else kill_after(seconds)
            run_recipe(recipe, evaluation=False)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills[kind] += 1
    print(*kills)


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]))
