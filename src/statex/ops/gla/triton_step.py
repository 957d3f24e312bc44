"""One token of gated linear attention on the GPU, in place on the state.

Shape letters: B batch, H heads, K key dim, V value dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 1024  # enough to keep all of memory busy
FEW_PROGRAMS = 256  # so few that each must have all of its part of the state on its way at once


@triton.jit
def step_kernel(
    q, k, v, log_decay, state, out, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV value channels of one head of one sequence: the whole key dim, BK channels at a time.

    The state is used once per token and there is much of it: it should not evict anything else from the caches.
    """
    cols_v = tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.program_id(1).to(tl.int64)
    values = tl.load(v + row * V + cols_v, mask=cols_v < V, other=0.0).to(tl.float32)
    result = tl.zeros((BK, BV), tl.float32)
    for k0 in range(0, K, BK):
        cols_k = k0 + tl.arange(0, BK)
        at = row * K + cols_k
        inside = cols_k < K
        queries = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        keys = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_decay + at, mask=inside, other=0.0).to(tl.float32))
        mask = inside[:, None] & (cols_v < V)[None, :]
        at_state = at[:, None] * V + cols_v[None, :]
        tile = tl.load(state + at_state, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tile = tile * decay[:, None] + keys[:, None] * values[None, :]
        tl.store(state + at_state, tile.to(state.dtype.element_ty), mask=mask, cache_modifier=".cs")
        result += tile * queries[:, None]
    tl.store(out + row * V + cols_v, (tl.sum(result, 0) * scale).to(out.dtype.element_ty), mask=cols_v < V)


def triton_gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """Advance `state` by one token and read it; arguments and result are those of `step_gla`, on CUDA."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = step_op if torch.compiler.is_compiling() else launch_step  # the operator costs a dispatch more
    return run(q, k, v, log_decay, state, scale)


def launch_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    key_dim, value_dim = state.shape[-2:]
    q, k, v, log_decay = (x.contiguous() for x in (q, k, v, log_decay))
    work = state.contiguous()  # the state itself where it is contiguous already
    out = torch.empty_like(v)
    rows = q.shape[0] * q.shape[1]
    tile_k, tile_v, warps = _tile(rows, key_dim, value_dim)
    with torch.cuda.device_of(state):
        step_kernel[(triton.cdiv(value_dim, tile_v), rows)](
            q,
            k,
            v,
            log_decay,
            work,
            out,
            scale,
            K=key_dim,
            V=value_dim,
            BK=tile_k,
            BV=tile_v,
            num_warps=warps,
            num_stages=4,
        )
    if work is not state:
        state.copy_(work)
    return out


def _tile(rows: int, key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Key channels a step, value channels, warps, for this many heads of all sequences together."""
    tile_v = max(16, min(128, triton.next_power_of_2(value_dim)))
    while tile_v > 16 and rows * triton.cdiv(value_dim, tile_v) < NUM_PROGRAMS:
        tile_v //= 2
    whole_k = triton.next_power_of_2(key_dim)
    if rows * triton.cdiv(value_dim, tile_v) > FEW_PROGRAMS:
        return max(1, min(2048 // tile_v, whole_k)), tile_v, 4
    tile_k = max(1, min(16384 // tile_v, whole_k))
    return tile_k, tile_v, max(4, min(16, tile_k * tile_v // 1024))


# As an operator torch.compile takes the step into its graph whole.
step_op = torch.library.custom_op("statex::gla_step", launch_step, mutates_args=("state",))


@step_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
