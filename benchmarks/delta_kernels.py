"""Each fused kernel of the gated delta rule by tile, warps and stages: milliseconds, beside the launch that is chosen.

The kernels run on what the ones before them made; a variant whose results are not those of the chosen launch is named
and not timed. All variants are compiled side by side first, into Triton's cache.

Examples:
  python benchmarks/delta_kernels.py --processes 14
  python benchmarks/delta_kernels.py --shapes 32x128x128 --kernels walk walk_back --tokens 65536
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from statex.benchmarking.cases import Case, make_inputs
from statex.ops.gated_delta import fused_launch as launch
from statex.ops.gated_delta.fused_launch import Launch, Tiles
from statex.utils.environment import source_commit, versions

KERNELS = ("prepare", "walk", "output", "walk_back", "gradient")
VARIANTS = {  # key channels, value channels, warps, stages; the chosen launch comes first by itself
    "prepare": [(64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 4, 2), (64, 128, 8, 2), (64, 128, 2, 2)],
    "walk": [
        (128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 4, 4), (128, 32, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2),
        (128, 16, 4, 2), (64, 32, 4, 3),
    ],
    "output": [(64, 128, 4, 3), (64, 128, 4, 2), (64, 128, 4, 4), (128, 128, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3)],
    "walk_back": [
        (128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 16, 4, 2),
    ],
    "gradient": [
        (32, 128, 4, 2), (32, 128, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2),
        (16, 128, 4, 3),
    ],
}  # fmt: skip
COMPILE_TOKENS = 128
TOLERANCE = 1e-2  # relative, between variants: they round in other places


class Kernels:
    """The kernels of one shape, each callable alone on what the ones before it made."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        inputs = make_inputs(case, torch.bfloat16, "cuda")
        self.q, self.k, self.v, self.log_decay, self.beta = inputs.values()
        self.scale = case.key_dim**-0.5
        self.layout = launch.layout_of(self.q, None)
        self.kept = launch.room_for(self.q, self.v, self.layout.num_chunks)
        self.d_output = torch.randn_like(self.v)
        self.chosen = launch.tiles(case.key_dim, case.value_dim, torch.bfloat16)
        self.prepare()
        self.walk()
        self.d_states, self.d_wrong = self.walk_back()

    def prepare(self) -> list[Tensor]:
        inputs = self.q, self.k, self.v, self.log_decay, self.beta
        launch.prepare(*inputs, self.scale, self.kept, self.layout)
        return [self.kept.inverse, self.kept.reads]

    def walk(self) -> list[Tensor]:
        launch.walk(self.k, self.v, None, None, self.kept, self.layout)
        return [self.kept.states, self.kept.written]

    def output(self) -> list[Tensor]:
        return [launch.read(self.q, self.v, self.scale, self.kept, self.layout)]

    def walk_back(self) -> list[Tensor]:
        inputs = self.d_output, None, self.q, self.k, self.v, None
        return list(launch.walk_back(*inputs, self.scale, self.kept, self.layout))

    def gradient(self) -> list[Tensor]:
        inputs = self.d_output, self.d_states, self.d_wrong, self.q, self.k, self.v, self.log_decay, self.beta
        return list(launch.gradients(*inputs, self.scale, self.kept, self.layout))

    def run(self, name: str, variant: Launch) -> list[Tensor]:
        """The results of a kernel by another launch."""
        original, tiles = launch.tiles, replace(self.chosen, **{name: variant})
        launch.tiles = _always(tiles)  # type: ignore[assignment]
        try:
            return getattr(self, name)()
        finally:
            launch.tiles = original


def _always(tiles: Tiles) -> Callable[..., Tiles]:
    return lambda *_: tiles


def variants_of(name: str, case: Case) -> list[Launch]:
    """The chosen launch, then the others that have room for this shape."""
    chosen = getattr(launch.tiles(case.key_dim, case.value_dim, torch.bfloat16), name)
    others = [Launch(*numbers) for numbers in VARIANTS[name]]
    if name.startswith("walk"):
        others = [each for each in others if case.key_dim <= 4 * each.keys]
    return [chosen, *(each for each in others if each != chosen)]


def compile_variants(cases: list[Case], kernels: list[str], part: int, parts: int) -> None:
    """Run every `parts`-th variant once, on few tokens."""
    number = 0
    for case in cases:
        bench = Kernels(replace(case, tokens=COMPILE_TOKENS))
        for name in kernels:
            for variant in variants_of(name, case):
                number += 1
                if number % parts == part:
                    try:
                        bench.run(name, variant)
                    except Exception as error:  # said again where it is to be timed
                        print(f"{case.name} {name} {tuple(variant)}: {error}"[:120], flush=True)


def distances(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, relative; NaN if there is one."""
    pairs = [((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(pairs).max().item()


def time_kernel(bench: Kernels, name: str, variant: Launch, wanted: list[Tensor] | None) -> tuple[str, list[Tensor]]:
    """Median milliseconds, or why there are none; and the results."""
    try:
        found = [x.clone() for x in bench.run(name, variant)]
    except Exception as error:  # too much shared memory, or not compiled: the other variants are still of interest
        return f"{type(error).__name__}: {error}"[:100], []
    if not distances(found, wanted or found) < TOLERANCE:
        return f"wrong: {distances(found, wanted or found):.1e}", found
    milliseconds = triton.testing.do_bench(lambda: bench.run(name, variant), warmup=20, rep=100, return_mode="median")
    return f"{milliseconds:.3f} ms", found


def time_all(case: Case, kernels: list[str]) -> None:
    bench = Kernels(case)
    print(f"\n{case.name}, {case.tokens} tokens, bf16")
    total = 0.0
    for name in kernels:
        wanted = None
        for variant in variants_of(name, case):
            result, found = time_kernel(bench, name, variant, wanted)
            if wanted is None:
                total += float(result.split()[0]) if result.endswith(" ms") else float("nan")
            print(f"{name:<10} {'chosen' if wanted is None else '':<6} {tuple(variant)!s:<18} {result}", flush=True)
            wanted = found if wanted is None else wanted
            del found
        if name in ("prepare", "walk"):  # so that the next kernel reads what the chosen launch made
            bench.run(name, getattr(bench.chosen, name))
    print(f"sum of the chosen launches: {total:.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x128x128"], help="heads x K x V")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    arguments = parser.parse_args()
    cases = []
    for shape in arguments.shapes:
        heads, key_dim, value_dim = map(int, shape.split("x"))
        cases.append(Case(shape, "gated_delta", heads, key_dim, value_dim, tokens=arguments.tokens))
    print(f"commit {source_commit()}; {versions()}; {torch.cuda.get_device_name()}", flush=True)
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    parts = arguments.processes
    workers = [
        context.Process(target=compile_variants, args=(cases, arguments.kernels, part, parts)) for part in range(parts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for case in cases:
        time_all(case, arguments.kernels)


if __name__ == "__main__":
    main()
