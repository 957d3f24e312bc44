"""The logistic function in kernels of convolutions and norms."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 x with a relative error of 2^-21, in 6 instructions. `tl.sigmoid` takes 11: its divisor
    may have any size, its power may be denormal. Kernels that gate each number they move do little else."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root
