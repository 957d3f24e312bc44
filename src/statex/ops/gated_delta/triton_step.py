"""One token of the gated delta rule on the GPU, in place on the state.

Shape letters: B batch, H heads, K key dim, V value dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers of the state in one program's tile, all on their way at once
NARROWEST = 8  # value channels: what memory moves at once, of fp32


@triton.jit
def step_kernel(
    q, k, v, log_decay, beta, state, out, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """BV value channels of one head of one sequence, with all key channels: what is written depends on all of them.

    The state is used once per token and there is much of it: it should not evict anything else from the caches.
    """
    cols_k, cols_v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.program_id(1).to(tl.int64)
    mask = (cols_k < K)[:, None] & (cols_v < V)[None, :]
    at_state = (row * K + cols_k)[:, None] * V + cols_v[None, :]
    tile = tl.load(state + at_state, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if BY_CHANNEL:
        decay = tl.load(log_decay + row * K + cols_k, mask=cols_k < K, other=0.0).to(tl.float32)
        tile *= tl.exp(decay)[:, None]
    else:
        tile *= tl.exp(tl.load(log_decay + row).to(tl.float32))
    keys = tl.load(k + row * K + cols_k, mask=cols_k < K, other=0.0).to(tl.float32)
    queries = tl.load(q + row * K + cols_k, mask=cols_k < K, other=0.0).to(tl.float32)
    values = tl.load(v + row * V + cols_v, mask=cols_v < V, other=0.0).to(tl.float32)
    rate = tl.load(beta + row).to(tl.float32)
    tile += keys[:, None] * (rate * (values - tl.sum(keys[:, None] * tile, 0)))[None, :]
    tl.store(state + at_state, tile.to(state.dtype.element_ty), mask=mask, cache_modifier=".cs")
    output = scale * tl.sum(queries[:, None] * tile, 0)
    tl.store(out + row * V + cols_v, output.to(out.dtype.element_ty), mask=cols_v < V)


def triton_gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """Advance `state` by one token and read it; arguments and result are those of `step_gated_delta`, on CUDA."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = step_op if torch.compiler.is_compiling() else launch_step  # the operator costs a dispatch more
    return run(q, k, v, log_decay, beta, state, scale)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    key_dim, value_dim = state.shape[-2:]
    q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
    work = state.contiguous()  # the state itself where it is contiguous already
    out = torch.empty_like(v)
    tile_k = triton.next_power_of_2(key_dim)
    tile_v = max(NARROWEST, min(TILE // tile_k, triton.next_power_of_2(value_dim)))
    with torch.cuda.device_of(state):
        step_kernel[(triton.cdiv(value_dim, tile_v), q.shape[0] * q.shape[1])](
            q, k, v, log_decay, beta, work, out, scale,
            K=key_dim, V=value_dim, BK=tile_k, BV=tile_v, BY_CHANNEL=log_decay.ndim == 3,
            num_warps=max(4, min(16, tile_k * tile_v // 1024)),
        )  # fmt: skip
    if work is not state:
        state.copy_(work)
    return out


# As an operator torch.compile takes the step into its graph whole.
step_op = torch.library.custom_op("statex::gated_delta_step", launch_step, mutates_args=("state",))


@step_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
