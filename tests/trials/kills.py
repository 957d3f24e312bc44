"""Kills trainings: `python tests/trials/kills.py [KILLS [FIRST_SEED]]`; prints how many, and how many values differ.

Rounds of tests/training/interrupted.py, each of another seed, until there were as many kills (SIGKILL, at a random
moment or in the middle of writing). After each round the run is ended, and every weight and every value compared,
bitwise, with a run that was never killed.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from statex.results import read_results
from tiny_recipe import ARMS, CONFIGS, environment, recipe_values, run_statex, write_recipe, write_text

INTERRUPTED = Path(__file__).parents[1] / "training" / "interrupted.py"


def weights(run: Path) -> dict[str, str]:
    """The SHA-256 of all weights of a run, by the names of their files."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*/model.safetensors"))
    }


def outcome(run: Path) -> dict[str, object]:
    """All that a run came to, but for seconds and bytes of the machine."""
    rows = [row for row in read_results(run / "results.jsonl") if row.suite not in ("cost", "run")]
    found = {
        json.dumps([row.model, row.arm, row.seed, row.suite, row.metric, row.slice, row.baseline]): row.value
        for row in rows
    }
    return weights(run) | found


def one_round(folder: Path, seed: int) -> tuple[int, int, int]:
    """The kills of a round, the values compared, and how many of them differ."""
    values = recipe_values(write_text(folder / "text"), folder / "runs", list(CONFIGS))
    values["arms"] = {name: ARMS[name] for name in ("lpt", "preserve")}
    names = ("whole", "interrupted")
    recipes = [write_recipe(folder / f"{name}.toml", values | {"name": name}) for name in names]
    command = [sys.executable, str(INTERRUPTED), *map(str, recipes), str(seed)]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert killed.returncode == 0, killed.stderr
    for recipe in recipes:
        done = run_statex("run", recipe)
        assert done.returncode == 0, done.stderr
    theirs, ours = (outcome(folder / "runs" / name) for name in names)
    differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    for key in differing:
        print(f"seed {seed}, {key}: {theirs.get(key)} without kills, {ours.get(key)} with them", flush=True)
    return sum(map(int, killed.stdout.split())), len(theirs), len(differing)


def main(kills: int = 100, seed: int = 0) -> int:
    killed = compared = differing = rounds = 0
    while killed < kills:
        with tempfile.TemporaryDirectory() as folder:
            counts = one_round(Path(folder), seed)
        seed, rounds = seed + 1, rounds + 1
        killed, compared, differing = (a + b for a, b in zip((killed, compared, differing), counts, strict=True))
        print(f"{killed} kills in {rounds} rounds: {differing} of {compared} values differ", flush=True)
    return differing


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
