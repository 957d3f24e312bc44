"""The generalised delta rule, one token at a time: the definition that the other versions are tested against.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

from functools import partial

import torch
from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision, over_segments


@full_precision
def naive_generalized_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t;  o_t = scale q_t S_t.

    Source: arXiv 2503.14456 (RWKV-7), section 4, with its state transposed. Arguments and results are those of
    `chunk_generalized_delta`.
    """
    inputs = q, k, v, log_decay, a, b
    if cu_seqlens is not None:
        recurrence = partial(naive_generalized_delta, scale=scale)
        return over_segments(recurrence, inputs, cu_seqlens, initial_state, output_final_state)
    batch, _, num_heads, key_dim = q.shape
    dtype = compute_dtype(v)
    scale = key_dim**-0.5 if scale is None else scale
    zeros = q.new_zeros(batch, num_heads, key_dim, v.shape[-1], dtype=dtype)
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, H, K, V]
    outputs = []
    tokens = (x.to(dtype).unbind(1) for x in inputs)
    for q_t, k_t, v_t, log_decay_t, a_t, b_t in zip(*tokens, strict=True):
        read = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = log_decay_t.exp()[..., None] * state + b_t[..., None] * read[..., None, :]
        state = state + k_t[..., None] * v_t[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    output = scale * torch.stack(outputs, dim=1)
    return output.to(v.dtype), state if output_final_state else None
