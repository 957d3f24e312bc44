"""The delta rule's kernels are compiled for a Hopper GPU, without one: what the interpreter lets pass, such as a
variable that changes its type in a loop, is an error there."""

import os
import subprocess
import sys

import pytest
import torch

COMPILE = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(function, types, constants, warps=4, stages=3):
    types = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    source = ASTSource(function, types, {(function.arg_names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    print(function.__name__, len(kernel.asm["cubin"]) > 0 and kernel.metadata.shared <= 227 * 1024)
"""
GENERAL = """
from statex.ops.gated_delta import triton_kernels as kernels
from statex.ops.gated_delta.triton_step import step_kernel

WALK = {"K": 100, "V": 72, "D": 100, "C": 64, "BK": 64, "BV": 16, "PRECISION": "tf32"}
for kernel, constants in ((kernels.inverse_kernel, {"C": 64}), *((k, WALK) for k in (kernels.walk_kernel, kernels.walk_back_kernel))):
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("removed", "keys", "queries"), "*bf16")
    compiled(kernel, types | {"N": "i32"}, constants)
for by_channel in (False, True):
    types = dict.fromkeys(step_kernel.arg_names, "*bf16") | {"state": "*fp32", "scale": "fp32"}
    compiled(step_kernel, types, {"K": 512, "V": 128, "BK": 512, "BV": 8, "BY_CHANNEL": by_channel})
"""  # noqa: E501
FUSED = """
from statex.ops.gated_delta import fused_kernels, fused_walks
from statex.ops.gated_delta import fused_launch as launch

key_dim, value_dim, dtype, described = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "described"
tiles = launch.tiles(key_dim, value_dim, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
for name in sys.argv[5:]:
    module = fused_walks if name.startswith("walk") else fused_kernels
    kernel, tile = getattr(module, name + "_kernel"), getattr(tiles, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"chunk_table": "*i32", "segment_table": "*i32", "scale": "fp32"}
    shapes = {name: (64, tile.keys) for name in ("q", "k", "dq", "dk")}
    shapes |= {name: (64, tile.values) for name in ("v", "d_out", "written", "d_wrong", "dv", "out")}
    shapes |= {name: (tile.keys, tile.values) for name in ("states", "d_states")}
    shapes |= dict.fromkeys(("inverse", "reads"), (64, 64))
    by_pointers = {"inverse", "reads"} if name == "prepare" else set()
    if name == "walk_back" and key_dim > 2 * tile.keys:
        by_pointers = {"q", "k", "inverse", "reads", "d_out"}
    for each, shape in shapes.items():
        types[each] = f"tensordesc<{dtype}{list(shape)}>" if described and each not in by_pointers else f"*{dtype}"
    constants = {"H": 32, "K": key_dim, "V": value_dim, "BK": tile.keys, "BV": tile.values, "DESCRIBED": described}
    constants["PRECISION"] = "tf32x3" if dtype == "fp32" else "tf32"
    if name.startswith("walk"):
        constants |= {"HAS_FIRST": True, "HAS_LAST": True}
    compiled(kernel, types, constants, tile.warps, tile.stages)
"""
WALKS = ("walk", "walk_back")
KERNELS = ("prepare", *WALKS, "output", "gradient")


def compile_in_a_process(script: str, folder, *arguments: str) -> None:
    """All kernels that the script prints are compiled, and have room in shared memory."""
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    (folder / "script.py").write_text(COMPILE + script)
    command = [sys.executable, str(folder / "script.py"), *arguments]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=240)
    compiled = done.stdout.split()
    assert done.returncode == 0, done.stderr[-3000:]
    assert compiled, done.stderr
    assert set(compiled[1::2]) == {"True"}, compiled


without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them")


@without_a_gpu
def test_kernels_of_any_decay_compile(tmp_path):
    pytest.importorskip("triton")
    compile_in_a_process(GENERAL, tmp_path)


@pytest.mark.slow
@without_a_gpu
@pytest.mark.parametrize(
    ("dims", "dtype", "read", "kernels"),
    [
        ((128, 128), "bf16", "described", KERNELS),
        ((100, 72), "bf16", "by_pointers", ("output",)),
    ],
    ids=str,
)
def test_fused_kernels_compile(dims, dtype, read, kernels, tmp_path):
    """The shapes that models have, and odd ones; on a GPU all launches of `fused_launch.tiles` are compiled and run."""
    pytest.importorskip("triton")
    compile_in_a_process(FUSED, tmp_path, *map(str, dims), dtype, read, *kernels)
