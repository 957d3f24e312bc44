"""The gated delta rule, one token at a time: the definition that the other versions are tested against.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

from functools import partial

import torch
from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision, over_segments


@full_precision
def naive_gated_delta(
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

    Sources: arXiv 2412.06464, equation 10; a decay for each channel: arXiv 2510.26692, equation 1. Arguments and
    results are those of `chunk_gated_delta`.
    """
    inputs = q, k, v, log_decay, beta
    if cu_seqlens is not None:
        recurrence = partial(naive_gated_delta, scale=scale)
        return over_segments(recurrence, inputs, cu_seqlens, initial_state, output_final_state)
    batch, _, num_heads, key_dim = q.shape
    dtype = compute_dtype(v)
    scale = key_dim**-0.5 if scale is None else scale
    decay = log_decay.to(dtype).exp().view(*log_decay.shape[:3], -1, 1)  # [B, T, H, 1 or K, 1]
    zeros = q.new_zeros(batch, num_heads, key_dim, v.shape[-1], dtype=dtype)
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, H, K, V]
    outputs = []
    tokens = (x.unbind(1) for x in (q.to(dtype), k.to(dtype), v.to(dtype), decay, beta.to(dtype)[..., None]))
    for q_t, k_t, v_t, decay_t, beta_t in zip(*tokens, strict=True):
        state = decay_t * state
        correction = beta_t * (v_t - torch.einsum("bhk,bhkv->bhv", k_t, state))
        state = state + k_t[..., None] * correction[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    output = scale * torch.stack(outputs, dim=1)
    return output.to(v.dtype), state if output_final_state else None
