"""Trains on a small disk until it is full: `python tests/trials/full_disk.py [ROUNDS]`, as root, who may mount a tmpfs.

Each round has a disk of another size, so that training meets its end in another file. It must end with status 1 and
one line that names the folder; and when there is room again, the same command must resume and end with the weights of
a run that always had room. Prints how many did.
"""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_recipe import TRAINING, run_statex
from trials.common import write_run

STEPS = TRAINING | {"steps": 12, "save_every": 1, "keep_checkpoints": 3}


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs at `folder`.

    Raises:
        PermissionError: this user may not mount one.
    """
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "statex-trial", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError(str(error)) from error
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an error may still hold a file that is mapped


def write_small_run(folder: Path, output: Path) -> Path:
    """The recipe of a run of one model that writes a checkpoint at each step."""
    model = {"family": "statex_gla", "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}}
    folder.mkdir()
    return write_run(folder, output, models={"gla": model | {"pretraining": STEPS}}, training=STEPS)


def weights(output: Path) -> dict[str, str]:
    """A hash of each trained model's weights."""
    found = sorted(output.rglob("trained/model.safetensors"))
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def filled(folder: Path, kilobytes: int, expected: dict[str, str]) -> str:
    """What came of training on a disk of this size."""
    with small_disk(folder / "disk", kilobytes) as disk:
        recipe = write_small_run(folder / "source", disk / "runs")
        first = run_statex("train", recipe)
        if first.returncode == 0:
            return "fitted" if weights(disk) == expected else "other weights"
        line = f"statex: no space left in {disk / 'runs' / 'run'}; free some space, then the same command resumes"
        said = first.stderr.splitlines()
        if first.returncode != 1 or "Traceback" in first.stderr or not any(text.startswith(line) for text in said):
            return f"status {first.returncode}: {first.stderr[-2000:]}"
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        again = run_statex("train", recipe)
        if again.returncode:
            return f"did not resume: {again.stderr[-2000:]}"
        return "full, reported, resumed" if weights(disk) == expected else "other weights"


def reference(folder: Path) -> dict[str, str]:
    """The weights where there is always room."""
    done = run_statex("train", write_small_run(folder / "source", folder / "disk" / "runs"))
    assert done.returncode == 0, done.stderr
    return weights(folder / "disk")


def main(rounds: int = 10) -> int:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "whole").mkdir()
        expected = reference(Path(name) / "whole")
        for number in range(rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            outcomes[filled(folder, 96 + 137 * number, expected)] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return rounds - outcomes["full, reported, resumed"] - outcomes["fitted"]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
