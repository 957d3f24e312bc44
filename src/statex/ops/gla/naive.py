"""Gated linear attention, one token at a time: the definition that the other versions are tested against.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

from functools import partial

import torch
from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision, over_segments


@full_precision
def naive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t  (arXiv 2312.06635, section 4).

    Arguments and results are those of `chunk_gla`.
    """
    if cu_seqlens is not None:
        recurrence = partial(naive_gla, scale=scale)
        return over_segments(recurrence, (q, k, v, log_decay), cu_seqlens, initial_state, output_final_state)
    batch, _, num_heads, key_dim = q.shape
    output_dtype, dtype = v.dtype, compute_dtype(v)
    scale = key_dim**-0.5 if scale is None else scale
    q, k, v, log_decay = (x.to(dtype) for x in (q, k, v, log_decay))
    zeros = v.new_zeros(batch, num_heads, key_dim, v.shape[-1])
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, H, K, V]
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v, log_decay.exp())), strict=True):
        state = decay_t[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    output = scale * torch.stack(outputs, dim=1)
    return output.to(output_dtype), state if output_final_state else None
