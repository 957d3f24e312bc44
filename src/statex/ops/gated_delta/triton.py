"""The gated delta rule on the GPU. In bf16 with a decay a head, up to 128 channels, all of it runs on fused kernels;
else walk and inverses do, and the products inside of chunks are PyTorch's.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor

from statex.ops.gated_delta.chunk import MAX_CHUNK, in_chunks
from statex.ops.gated_delta.triton_fused import fits, fused_gated_delta
from statex.ops.gated_delta.triton_kernels import inverse_of_unit_lower, walk_over_chunks
from statex.ops.gated_delta.triton_step import triton_gated_delta_step
from statex.ops.recomputed import GATED_DELTA_ARGUMENTS, fake_gated_delta, operator_of
from statex.ops.segments import full_precision

__all__ = ["triton_gated_delta", "triton_gated_delta_step"]

MOST_BYTES = 8 * 2**30
"""Most bytes for the heads computed at a time; heads are independent of one another."""


def triton_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S'_t = diag(exp(log_decay_t)) S_{t-1};  S_t = S'_t + beta_t k_t^T (v_t - k_t S'_t);  o_t = scale q_t S_t.

    Arguments and results are those of `chunk_gated_delta`, on CUDA. bf16 inputs use bf16 products with fp32 sums,
    inverses and states; others are computed in fp32. The fused kernels keep a copy of the state for each chunk, in the
    dtype of the products; else only the arguments are kept for the backward pass, which computes the forward again,
    some heads at a time.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if fits(v, log_decay, q.shape[-1]):
        return fused_gated_delta(q, k, v, log_decay, beta, scale, initial_state, output_final_state, cu_seqlens)
    outputs, states = [], []
    for heads in _groups(q, v, log_decay):
        tokens = (x[:, :, heads] for x in (q, k, v, log_decay, beta))
        first = None if initial_state is None else initial_state[:, heads]
        output, state = _OPERATOR(*tokens, first, cu_seqlens, scale, output_final_state)
        outputs.append(output)
        states.append(state)
    if len(outputs) == 1:
        return outputs[0], states[0] if output_final_state else None
    return torch.cat(outputs, dim=2), torch.cat(states, dim=1) if output_final_state else None


def _groups(q: Tensor, v: Tensor, log_decay: Tensor) -> list[slice]:
    """The heads, as many at a time as MOST_BYTES allow for what the backward pass makes of them."""
    num_heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    of_a_token = (40 if log_decay.ndim == 4 else 6) * key_dim + 8 * value_dim + 8 * MAX_CHUNK  # counted in fp32 numbers
    of_a_token += 3 * key_dim * value_dim // MAX_CHUNK
    at_once = max(1, min(num_heads, MOST_BYTES // (4 * of_a_token * q.shape[0] * q.shape[1])))
    return [slice(start, min(start + at_once, num_heads)) for start in range(0, num_heads, at_once)]


@full_precision
def walked_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`triton_gated_delta` of some heads."""
    with torch.cuda.device_of(q):
        return in_chunks(
            walk_over_chunks,
            inverse_of_unit_lower,
            *(q, k, v, log_decay, beta),
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            operands=torch.bfloat16 if v.dtype == torch.bfloat16 else None,
        )


_OPERATOR = operator_of(walked_gated_delta, GATED_DELTA_ARGUMENTS, fake_gated_delta)
