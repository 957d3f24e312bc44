"""Try many damaged inputs: `python tests/robustness/long_run.py [--number 10000] [--seed 0] [--kind NAME]`.

Each input is accepted or refused by a UserError within 5 seconds and 1 GB, and nothing is written: everything else is a
failure, printed with its input. The counts go to standard output as a Markdown table.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS, BYTES = 5.0, 2**30


def model_folders(place: Path) -> tuple[SearchStrategy, Callable]:
    """Damaged model folders."""
    import model_folders

    folders = model_folders.make_folders(place / "whole")
    return model_folders.damages(folders), lambda damage: model_folders.try_damage(folders, damage, place)


def odd_recipes(place: Path) -> tuple[SearchStrategy, Callable]:
    """Recipes and overrides with odd values."""
    import recipes

    place.mkdir(parents=True, exist_ok=True)
    recipes.try_recipe(place, ("warm-up", "gla", [], False, True))  # which imports all that a run does
    return recipes.odd_recipes(), lambda case: recipes.try_recipe(place, case)


KINDS: dict[str, Callable[[Path], tuple[SearchStrategy, Callable]]] = {
    "model folders": model_folders,
    "recipes": odd_recipes,
}
"""Each makes, in a folder of its own, a strategy of inputs and the function that says what becomes of one."""


SLOWEST = [0.0]
"""Seconds that an input took at most."""


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_one(call: Callable, case: object, counts: Counter[str]) -> None:
    """Count what becomes of one input; a failure is printed."""
    begin, before = time.monotonic(), peak_bytes()
    try:
        found = call(case)
    except Exception as error:  # counted and printed: nothing is hidden
        found = f"FAILED: {type(error).__name__}"
        print(f"--- {case!r:.2000}\n{traceback.format_exc()[-3000:]}", file=sys.stderr)
    seconds = time.monotonic() - begin
    SLOWEST[0] = max(SLOWEST[0], seconds)
    if seconds > SECONDS:
        found = f"FAILED: more than {SECONDS:g} s"
        print(f"--- {seconds:.1f} s: {case!r:.2000}", file=sys.stderr)
    if peak_bytes() - before > BYTES:
        found = f"FAILED: more than {BYTES:,} bytes"
        print(f"--- {peak_bytes() - before:,} bytes: {case!r:.2000}", file=sys.stderr)
    counts[found] += 1


def try_many(inputs: SearchStrategy, call: Callable, number: int, first: int, counts: Counter[str]) -> None:
    """Count what becomes of a number of inputs; the same for the same seed."""

    @seed(first)
    @settings(
        max_examples=number, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def run(case):
        try_one(call, case, counts)

    run()


def main() -> int:
    """Run all kinds; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    failed = False
    print("| kind | outcome | inputs |\n|---|---|---:|")
    for kind in arguments.kind or KINDS:
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as place:
            inputs, call = KINDS[kind](Path(place))
            # Memory beyond a limit is refused by the system, and so seen even where it would be given back at once
            limit = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 2 * BYTES, limit[1]))
            try_many(inputs, call, arguments.number, arguments.seed, counts)
            resource.setrlimit(resource.RLIMIT_DATA, limit)
        for outcome, number in sorted(counts.items()):
            print(f"| {kind} | {outcome} | {number} |")
            failed |= outcome.startswith("FAILED")
    print(f"\nat most {SLOWEST[0]:.1f} s, peak memory {peak_bytes() / 2**20:.0f} MiB, seed {arguments.seed}")
    return int(failed)


def data_bytes() -> int:
    """The private memory that this process has asked for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))


if __name__ == "__main__":
    sys.exit(main())
