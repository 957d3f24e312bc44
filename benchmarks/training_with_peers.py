"""`statex bench training` for FLA's own GLA beside ours, with FLA's kernels tuned in minutes instead of many.

As in ops_with_peers.py, many processes first compile the variants of FLA's recurrence into Triton's cache, and its
choice is narrowed to 4 or 8 warps and 2 or 3 stages: say so beside figures made with it.

Example: python benchmarks/training_with_peers.py --processes 14 --out out
"""

import argparse
import multiprocessing
from pathlib import Path

from ops_with_peers import compile_variants, narrow_choice, to_compile
from statex.benchmarking.cases import CASES
from statex.benchmarking.training import run_training_benchmark

RECURRENCE = "gla-4x256x512"  # of a layer of 1.3B parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["gla-1.3b-64k-fla", "gla-1.3b-64k"])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    cases = to_compile([CASES[RECURRENCE]])
    workers = [context.Process(target=compile_variants, args=(cases, i, True)) for i in range(arguments.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    narrow_choice()
    run_training_benchmark(arguments.cases, out=arguments.out)


if __name__ == "__main__":
    main()
