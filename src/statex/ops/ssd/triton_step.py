"""One token of state space duality (Mamba2) on the GPU, in place on the state.

Shape letters: B batch, H heads, G groups, P head dim, N state size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers of the state in one program's tile: 8 a thread, all on their way at once
WIDEST = 1024  # state size up to which a tile has all of it, so that there is no loop


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, dt_bias, state, out, stride_x, stride_dt, stride_b, stride_c,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BP channels of one head of one sequence: the whole state size, BN numbers at a time.

    The state is used once per token and there is much of it: it should not evict anything else from the caches.
    """
    cols_p = tl.program_id(0) * BP + tl.arange(0, BP)
    row = tl.program_id(1).to(tl.int64)
    head, batch = row % H, row // H
    group_n = head // (H // G) * N
    step = tl.load(dt + batch * stride_dt + head).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + head).to(tl.float32)
        grown = tl.exp(step)
        above_one = 1 + grown  # log(1 + y) to full precision: what rounding takes from 1 + y, the quotient gives back
        exact = tl.log(above_one) * (grown / tl.where(above_one == 1, 1.0, above_one - 1))
        step = tl.where(step > 20, step, tl.where(above_one == 1, grown, exact))
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    values = tl.load(x + batch * stride_x + head * P + cols_p, mask=cols_p < P, other=0.0).to(tl.float32)
    result = tl.zeros((BP, BN), tl.float32)
    for n0 in range(0, N, BN):
        cols = n0 + tl.arange(0, BN)
        writes = tl.load(B + batch * stride_b + group_n + cols, mask=cols < N, other=0.0).to(tl.float32)
        reads = tl.load(C + batch * stride_c + group_n + cols, mask=cols < N, other=0.0).to(tl.float32)
        mask = (cols_p < P)[:, None] & (cols < N)[None, :]
        at = (row * P + cols_p)[:, None] * N + cols[None, :]
        tile = tl.load(state + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tile = tile * decay + (step * values)[:, None] * writes[None, :]
        tl.store(state + at, tile.to(state.dtype.element_ty), mask=mask, cache_modifier=".cs")
        result += tile * reads[None, :]
    output = tl.sum(result, 1)
    if HAS_D:
        output += tl.load(D + head).to(tl.float32) * values
    tl.store(out + row * P + cols_p, output.to(out.dtype.element_ty), mask=cols_p < P)


def triton_ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    """Advance `state` by one token and read it; arguments and result are those of `step_ssd`, on CUDA."""
    run = step_op if torch.compiler.is_compiling() else launch_step  # the operator costs a dispatch more
    return run(x, dt, A, B, C, state, D, dt_bias)


def launch_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor:
    batch, heads, head_dim, state_size = state.shape
    x, dt, B, C = (row if row[0].is_contiguous() else row.contiguous() for row in (x, dt, B, C))  # rows may lie apart
    A = A.contiguous()
    D, dt_bias = (each if each is None else each.contiguous() for each in (D, dt_bias))
    work = state.contiguous()  # the state itself where it is contiguous already
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile_n = max(16, min(WIDEST, triton.next_power_of_2(state_size)))
    tile_p = max(1, min(TILE // tile_n, triton.next_power_of_2(head_dim)))
    with torch.cuda.device_of(state):
        step_kernel[(triton.cdiv(head_dim, tile_p), batch * heads)](
            x, dt, A, B, C, D, dt_bias, work, out, x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
            H=heads, G=B.shape[1], P=head_dim, N=state_size, BP=tile_p, BN=tile_n,
            HAS_D=D is not None, HAS_BIAS=dt_bias is not None, num_warps=4,
        )  # fmt: skip
    if work is not state:
        state.copy_(work)
    return out


# As an operator torch.compile takes the step into its graph whole.
step_op = torch.library.custom_op("statex::ssd_step", launch_step, mutates_args=("state",))


@step_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
