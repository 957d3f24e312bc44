"""Kills a small run before each of its writes in turn: `python tests/trials/each_write.py [EVERY [FAMILY]]`.

The n-th run is killed (SIGKILL) when it is about to write, rename or remove its n-th file, and then done to its end;
its weights must be bitwise those of a run that was never killed. With EVERY = 5 only each fifth n is tried. Ends at the
first n that a run does not reach.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # torch reads it; a forked process has one thread

from interrupted import kill_at_write
from kills import weights

from statex.recipe import Recipe, load_recipe
from statex.run import run_recipe
from tiny_recipe import ARMS, recipe_values, write_recipe, write_text


def in_child(recipe: Recipe, number: int | None = None) -> bool:
    """Run a recipe without its evaluation in a process of its own; whether it was killed, at its write `number`."""
    child = os.fork()
    if child == 0:
        if number is not None:
            kill_at_write(number, recipe.folder)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        run_recipe(recipe, evaluation=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, status
    return False


def main(every: int = 1, family: str = "statex_gla") -> int:
    differing = kills = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        values = recipe_values(write_text(Path(folder, "text")), Path(folder, "runs"), [family])
        values["arms"] = {"preserve": ARMS["preserve"]}
        recipe = load_recipe(write_recipe(Path(folder, "recipe.toml"), values))
        run_recipe(recipe, evaluation=False)  # here, so that processes that are forked have torch imported
        whole = weights(recipe.folder)
        while True:
            shutil.rmtree(recipe.folder)
            if not in_child(recipe, 1 + kills * every):
                break
            assert not in_child(recipe)
            found = weights(recipe.folder)
            wrong = [name for name in whole | found if whole.get(name) != found.get(name)]
            kills, compared, differing = kills + 1, compared + len(whole), differing + len(wrong)
            for name in wrong:
                print(f"killed before write {1 + (kills - 1) * every}: {name} differs", flush=True)
            if kills % 20 == 0:
                print(f"{kills} kills: {differing} of {compared} weights differ", flush=True)
    print(f"{kills} kills: {differing} of {compared} weights differ", flush=True)
    return differing


if __name__ == "__main__":
    sys.exit(bool(main(*(int(each) if each.isdecimal() else each for each in sys.argv[1:]))))
