"""Kernels are compiled for a Hopper GPU, without one: what the interpreter lets pass, such as a variable that changes
its type in a loop, is an error there. Those of the layers must also fit the registers."""

import os
import subprocess
import sys

import pytest
import torch

COMPILE = """
import re
import subprocess
import sys

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(function, types, constants, **options):
    types = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    wide = [name for name in types if types[name].startswith("*") or name.startswith("stride")]
    source = ASTSource(
        function, types, {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in wide},
    )
    return triton.compile(source, GPUTarget("cuda", 90, 32), options)

def spilled(kernel):
    "Bytes of a thread for which there was no register."
    with open(sys.argv[1], "wb") as file:
        file.write(kernel.asm["cubin"])
    usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", sys.argv[1]], capture_output=True, text=True)
    return int(re.search("STACK:([0-9]+)", usage.stdout)[1])
"""

LAYERS = """
from statex.ops import triton_convolution as convolution, triton_gated_norm as norm

BF16 = dict.fromkeys(("x", "out", "d_out", "dx", "gate", "d_gate"), "*bf16")
NUMBERS = dict.fromkeys(("T", "L", "rows", "tiles", "stride_b", "stride_t", "context_b", "context_t", "d_out_b"), "i32")
NUMBERS |= dict.fromkeys(("d_out_t", "stride_x", "stride_gate", "stride_d_out"), "i32") | {"eps": "fp32"}
STRIPS = {"D": 1152, "W": 4, "S": convolution.LONG_STRIP, "BR": convolution.STRIPS, "BD": convolution.TILE_CHANNELS}
STRIPS |= {"U": convolution.GROUP, "HAS_BIAS": True, "HAS_SEGMENTS": False, "seq_idx": None}
OF_SUMS = {"HAS_CONTEXT": False, "context": None}
ROWS = {"D": 1024, "SIZE": 1024, "HAS_GATE": True, "HAS_WEIGHT": True, "GATE_FIRST": True}
for kernel, constants, options in (
    (convolution.convolution_kernel, STRIPS | OF_SUMS, {"num_warps": 4}),
    (convolution.convolution_gradient_kernel, STRIPS | {"HAS_DX": True}, {"num_warps": 4, "maxnreg": 168}),
    (norm.gated_norm_kernel, ROWS | {"BR": 4, "BD": 1024}, {"num_warps": 8}),
    (norm.gated_norm_gradient_kernel, ROWS | {"BR": 1, "BD": 1024}, {"num_warps": 4}),
):
    print(kernel.__name__, spilled(compiled(kernel, BF16 | NUMBERS, constants, **options)))
"""


WANTED = ["convolution_kernel", "0", "convolution_gradient_kernel", "0"]
WANTED += ["gated_norm_kernel", "0", "gated_norm_gradient_kernel", "0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them")
def test_kernels_of_layers_compile(tmp_path):
    pytest.importorskip("triton")
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script, cubin = tmp_path / "script.py", tmp_path / "cubin"
    script.write_text(COMPILE + LAYERS)
    command = [sys.executable, str(script), str(cubin)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == WANTED, done.stderr
