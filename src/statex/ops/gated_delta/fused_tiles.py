"""Tiles of what the fused kernels of the gated delta rule read and write, by pointers or by descriptors.

Shape letters as in fused_kernels.py. DESCRIBED: the tensor is a descriptor of such tiles; no tile needs a mask then.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)


@triton.jit
def tile(
    x, first, length, head, c0,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of one head of one chunk's tokens [., H, D]; zeros past its length."""
    if DESCRIBED:
        tile = x.load([first, head * D + c0])
    else:
        rows, cols = tl.arange(0, CHUNK), c0 + tl.arange(0, WIDTH)
        at = (first.to(tl.int64) * H + head) * D + (rows * (H * D))[:, None] + cols[None, :]
        tile = tl.load(x + at, mask=(rows < length)[:, None] & (cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    x, first, length, head, c0, tile,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        x.store([first, head * D + c0], tile.to(x.dtype))
    else:
        rows, cols = tl.arange(0, CHUNK), c0 + tl.arange(0, WIDTH)
        at = (first.to(tl.int64) * H + head) * D + (rows * (H * D))[:, None] + cols[None, :]
        mask = (rows < length)[:, None] & (cols < D)[None, :]
        tl.store(x + at, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(
    states, index, k0, v0,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[BK, BV] of one state [K, V]."""
    if DESCRIBED:
        tile = states.load([index * K + k0, v0])
    else:
        rows, cols = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
        at = (index.to(tl.int64) * K + rows)[:, None] * V + cols[None, :]
        tile = tl.load(states + at, mask=(rows < K)[:, None] & (cols < V)[None, :], other=0.0)
    return tile


@triton.jit
def store_state_tile(
    states, index, k0, v0, tile,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        states.store([index * K + k0, v0], tile)
    else:
        rows, cols = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
        at = (index.to(tl.int64) * K + rows)[:, None] * V + cols[None, :]
        tl.store(states + at, tile, mask=(rows < K)[:, None] & (cols < V)[None, :])


@triton.jit
def square(x, index, DESCRIBED: tl.constexpr):
    """[C, C] out of [., C, C]."""
    if DESCRIBED:
        tile = x.load([index * CHUNK, 0])
    else:
        rows = tl.arange(0, CHUNK)
        tile = tl.load(x + index.to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :])
    return tile
