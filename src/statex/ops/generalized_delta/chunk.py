"""The generalised delta rule in chunks: plain PyTorch with autograd, any device.

Shape letters: B batch, T time, H heads, K key dim, V value dim; N chunks of C tokens.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.ops.gated_delta.chunk import (
    MAX_CHUNK,
    across_chunks,
    into_chunks,
    inverse_of_unit_lower,
    join_blocks,
    sum_after,
)
from statex.ops.segments import compute_dtype, full_precision, over_segments, power_of_two


@full_precision
def chunk_generalized_delta(
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

    Source: arXiv 2503.14456 (RWKV-7), section 4, with its state transposed. Of a chunk whose state is S_0 at its start,
    u_t = a_t S_{t-1} are the solution of a unit lower triangular system; what is written is then k_t^T v_t + b_t^T u_t.

    Args:
        q, k, a, b: [B, T, H, K]. RWKV-7's are a = -kk and b = kk * rate, with |kk| = 1 and rates from 0 to 1: others
            may make the state grow without bound.
        v: [B, T, H, V].
        log_decay: [B, T, H, K], <= 0, natural logarithm, one per key channel.
        scale, initial_state, output_final_state, cu_seqlens: as of `statex.ops.generalized_delta`.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state or None. The arithmetic and the states are
        fp32 (fp64 for fp64 inputs).
    """
    inputs = q, k, v, log_decay, a, b
    if cu_seqlens is not None:
        recurrence = partial(chunk_generalized_delta, scale=scale)
        return over_segments(recurrence, inputs, cu_seqlens, initial_state, output_final_state)
    num_tokens, num_heads, key_dim = q.shape[1:]
    chunk, dtype = min(MAX_CHUNK, power_of_two(num_tokens)), compute_dtype(v)
    scale = key_dim**-0.5 if scale is None else scale
    queries, keys, values, decays, a, b = (into_chunks(x.to(dtype), chunk) for x in inputs)  # [B, H, N, C, K or V]
    of_a = F.pad(a[..., 1:, :], (0, 0, 0, 1))  # a_t reads the state that token t - 1 has left, as q_{t-1} does
    pairs = _pairs(torch.stack((queries, of_a), -3), torch.stack((b, keys), -3), decays)  # [B, H, N, 2, 2, C, C]
    reads, earlier = pairs.transpose(-3, -2).flatten(-2).unbind(-3)  # [B, H, N, C, 2 C]
    of_b, of_k = F.pad(earlier[..., :-1, :], (0, 0, 1, 0)).chunk(2, dim=-1)
    inverse = inverse_of_unit_lower(-of_b)
    through, after = decays.cumsum(-2), sum_after(decays).exp()
    removed = inverse @ (F.pad(through[..., :-1, :], (0, 0, 1, 0)).exp() * a)
    state = None if initial_state is None else initial_state.to(dtype).flatten(0, 1)
    output, written, state = across_chunks(
        torch.cat((inverse @ (of_k @ values), values), dim=-2),
        F.pad(-removed, (0, 0, 0, chunk)),  # what k_t writes does not hang on the state
        torch.cat((after * b, after * keys), dim=-2),
        through.exp() * queries,
        torch.ones_like(decays[..., :1, :1]),
        through[..., -1, :, None].exp(),
        state,
    )
    output = scale * (output + reads.flatten(0, 1) @ written)
    output = output.view(-1, num_heads, queries.shape[2] * chunk, v.shape[-1])[:, :, :num_tokens].transpose(1, 2)
    return output.to(v.dtype), state.unflatten(0, (-1, num_heads)) if output_final_state else None


def _pairs(queries: Tensor, keys: Tensor, log_decay: Tensor) -> Tensor:
    """What each query of token t has of each key of every token s <= t of its chunk.

    Takes queries and keys of several kinds, [..., kinds, C, K], and log_decay [..., C, K]; returns
    [..., kinds of queries, kinds of keys, C, C], lower triangular. Neighbouring blocks are joined, as for the gated
    delta rule, so that no exponent is positive.
    """
    size = queries.shape[-2]
    queries, keys, log_decay = queries[..., :, None, :, :], keys[..., None, :, :, :], log_decay[..., None, None, :, :]
    pairs = (queries * keys).sum(-1)[..., None, None]  # [..., C, 1, 1]
    block = 1
    while block < size:
        later, earlier, decays = (x.unflatten(-2, (-1, 2, block)) for x in (queries, keys, log_decay))
        left, right = decays.unbind(-3)
        below = (right.cumsum(-2).exp() * later[..., 1, :, :]) @ (sum_after(left).exp() * earlier[..., 0, :, :]).mT
        pairs = join_blocks(pairs, below)
        block *= 2
    return pairs.squeeze(-3)
