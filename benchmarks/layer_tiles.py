"""Other tile sizes of the kernels of the short convolution and the gated norm, at the shapes of training steps.

Each constant of their modules is changed alone, and both passes are timed as in layer_ops.py, whose checks against fp64
come first.

Example: python benchmarks/layer_tiles.py --case "mamba2 45M convolution"
"""

import argparse
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from layer_ops import CASES, TOLERANCE, Case, step_passes, worst_error
from statex.ops import triton_convolution, triton_gated_norm

VARIANTS: dict[str, tuple[ModuleType, list[dict[str, Any]]]] = {
    "convolution": (
        triton_convolution,
        [
            {},
            {"LONG_STRIP": 32},
            {"LONG_STRIP": 128},
            {"GROUP": 2},
            {"GROUP": 8},
            {"TILE_CHANNELS": 256},
            {"STRIPS": 2},
            {"STRIPS": 8},
            {"REGISTERS": 128},
        ],
    ),
    "norm": (
        triton_gated_norm,
        [
            {},
            {"TILE": 2048},
            {"GRADIENT_TILE": 2048},
            {"GRADIENT_PROGRAMS": 2},
            {"GRADIENT_PROGRAMS": 5},
            {"GRADIENT_PROGRAMS": 8},
            {"GRADIENT_PROGRAMS": 16},
        ],
    ),
}


def time_variants(case: Case) -> None:
    module, variants = VARIANTS[case.op]
    for changes in variants:
        with mock.patch.multiple(module, **changes) if changes else nullcontext():
            triton_gated_norm._most_programs.cache_clear()
            torch.manual_seed(0)
            error = worst_error(case, "triton")
            if not error < TOLERANCE:
                print(f"{case.name:26} {changes}: WRONG, error {error:.1e}", flush=True)
                continue
            passes = ", ".join(
                f"{record['pass'].removeprefix('step, ')} {record['ms']:.4f} ms ({record['floor_share']:.0%})"
                for record in step_passes(case)
            )
            print(f"{case.name:26} {changes or 'as it is'}: {passes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.case is None or case.name in arguments.case:
            time_variants(case)


if __name__ == "__main__":
    main()
