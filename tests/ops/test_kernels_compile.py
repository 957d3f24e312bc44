"""The delta rule's kernels are compiled for a Hopper GPU, without one: what the interpreter lets pass, such as a
variable that changes its type in a loop, is an error there."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from statex.ops.gated_delta import triton_kernels

TYPES = {"N": "i32"} | dict.fromkeys(("removed", "keys", "queries"), "*bf16")
WALK = {"K": 100, "V": 72, "D": 100, "C": 64, "BK": 64, "BV": 16, "PRECISION": "tf32"}
for kernel, constants in (("inverse_kernel", {"C": 64}), ("walk_kernel", WALK), ("walk_back_kernel", WALK)):
    function = getattr(triton_kernels, kernel)
    types = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in function.arg_names}
    source = ASTSource(function, types, {(function.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    print(kernel, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them")
def test_kernels_of_the_delta_rule_compile(tmp_path):
    pytest.importorskip("triton")
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env=surroundings, capture_output=True, text=True, timeout=120
    )
    compiled = ["inverse_kernel", "True", "walk_kernel", "True", "walk_back_kernel", "True"]
    assert done.stdout.split() == compiled, done.stderr
