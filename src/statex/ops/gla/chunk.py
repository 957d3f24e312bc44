"""Gated linear attention in chunks: plain PyTorch with autograd, any device.

Shape letters: B batch, T time, H heads, K key dim, V value dim; N chunks of C tokens.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.ops.segments import compute_dtype, full_precision, over_segments, power_of_two

MIN_CHUNK, MAX_CHUNK = 16, 64
SAFE_DECAY = 16  # largest sum of log decays over a block whose decays are factored


@full_precision
def chunk_gla(
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

    Args:
        q, k, log_decay: [B, T, H, K]; log_decay <= 0, natural logarithm, one per key channel.
        v: [B, T, H, V].
        scale: factor on the output, K**-0.5 by default.
        initial_state: [B, H, K, V], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; B must be 1 and the states are
            [S, H, K, V]. The state is reset at each border.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state or None. The arithmetic and the states are
        fp32 (fp64 for fp64 inputs).
    """
    if cu_seqlens is not None:
        recurrence = partial(chunk_gla, scale=scale)
        return over_segments(recurrence, (q, k, v, log_decay), cu_seqlens, initial_state, output_final_state)
    num_tokens, key_dim = q.shape[1], q.shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    chunk = _chunk_size(num_tokens, key_dim)
    dtype = compute_dtype(v)
    queries, keys, values, decays = (_into_chunks(x.to(dtype), chunk) for x in (scale * q.to(dtype), k, v, log_decay))
    output, queries, keys, decays = _within_chunks(queries, keys, values, decays)
    states, final_state = _across_chunks(keys.mT @ values, decays.exp(), initial_state)
    output = torch.baddbmm(output.flatten(0, 2), queries.flatten(0, 2), states.flatten(0, 2)).view_as(output)
    output = output.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)  # [B, T, H, V]
    return output.to(v.dtype), final_state if output_final_state else None


def _chunk_size(num_tokens: int, key_dim: int) -> int:
    """About the key dimension: then the products of a chunk with itself and with the state cost the same."""
    return min(power_of_two(num_tokens), max(MIN_CHUNK, min(MAX_CHUNK, power_of_two(key_dim))))


def _into_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> [B, H, N, C, D], padded with zeros: such a token neither decays nor writes."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention inside each chunk: blocks of a safe size directly, then neighbouring blocks are merged.

    A block keeps q decayed from the block's start (its token included), k decayed to the block's end (its token
    excluded) and its total log decay. Merging two blocks needs only products of these: no exponent is positive and
    no two sums of decays are subtracted, so nothing overflows and nothing cancels, however strong the decay.

    Takes [B, H, N, C, K or V]; returns output [B, H, N, C, V], q and k for the whole chunk, and its log decay
    [B, H, N, K].
    """
    chunk, size = q.shape[-2], _safe_block(log_decay)
    q, k, v, log_decay = (x.unflatten(-2, (-1, size)) for x in (q, k, v, log_decay))  # [..., blocks, size, D]
    output, q, k, total = _within_blocks(q, k, v, log_decay)
    while size < chunk:
        (q_left, q_right), (k_left, k_right), (v_left, _), (output_left, output_right), (left, right) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (q, k, v, output, total)
        )
        output_right = output_right + q_right @ k_left.mT @ v_left
        output = torch.cat((output_left, output_right), dim=-2)
        q = torch.cat((q_left, q_right * left.exp()), dim=-2)
        k = torch.cat((k_left * right.exp(), k_right), dim=-2)
        v = v.flatten(-3, -2).unflatten(-2, (-1, 2 * size))
        total = left + right
        size *= 2
    return output.squeeze(-3), q.squeeze(-3), k.squeeze(-3), total.squeeze((-3, -2))


def _safe_block(log_decay: Tensor) -> int:
    """The size of block in which decays may be factored, from log_decay [..., C, K].

    It is the largest over which no channel decays by more than exp(-SAFE_DECAY), so that factors relative to the
    middle are at most exp(SAFE_DECAY / 2) and lose no digits; 1 where single tokens forget nearly everything.
    """
    size = chunk = log_decay.shape[-2]
    while size >= min(chunk, SAFE_DECAY):
        if log_decay.detach().unflatten(-2, (-1, size)).sum(-2).min() >= -min(chunk, SAFE_DECAY):
            return size
        size //= 2
    return 1


def _within_blocks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_within_chunks` keeps of each block [..., size, D], from a safe size on; the total is [..., 1, K]."""
    size = q.shape[-2]
    if size == 1:
        return (q * k).sum(-1, keepdim=True) * v, q * log_decay.exp(), k, log_decay
    decay = log_decay.cumsum(-2)
    middle = decay[..., -1:, :] / 2
    q = q * (decay - middle).exp()
    k = k * (middle - decay).exp()
    output = (q @ k.mT) * q.new_ones(size, size).tril() @ v
    half = middle.exp()
    return output, q * half, k * half, 2 * middle


def _across_chunks(updates: Tensor, decays: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State at the start of each chunk [B, H, N, K, V], and after the last; from updates [B, H, N, K, V]."""
    state = torch.zeros_like(updates[:, :, 0]) if initial_state is None else initial_state.to(updates.dtype)
    states = []
    for update, decay in zip(updates.unbind(2), decays[..., None].unbind(2), strict=True):
        states.append(state)
        state = torch.addcmul(update, decay, state)
    return torch.stack(states, dim=2), state
