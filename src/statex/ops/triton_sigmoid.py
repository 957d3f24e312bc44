"""The logistic function in kernels of convolutions and norms."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """Of fp32 x, to 2^-21 of itself, in 6 instructions; `tl.sigmoid` takes 11, for a division whose divisor may be
    large and a power that may be denormal, and kernels that gate each number they move do little else."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root
