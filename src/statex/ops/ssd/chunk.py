"""State space duality (Mamba2) in chunks: plain PyTorch with autograd, any device.

Shape letters: B batch, T time, H heads, P head dim, N state size, G groups; n chunks of c tokens, R = H / G.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.ops.segments import compute_dtype, full_precision, over_segments, power_of_two

MIN_CHUNK, MAX_CHUNK = 32, 128


@full_precision
def chunk_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t  (arXiv 2405.21060, section 6).

    Args:
        x: [B, T, H, P].
        dt: [B, T, H], after softplus and clamping: positive.
        A: [H], negative.
        B, C: [B, T, G, N], G divides H; head h reads group h // (H // G).
        D: [H] or None.
        initial_state: [B, H, P, N], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; the batch must be 1 and the states
            are [S, H, P, N]. The state is reset at each border.

    Returns:
        output [B, T, H, P] in the dtype of x, and the final state or None. The arithmetic and the states are
        fp32 (fp64 for fp64 inputs).
    """
    if cu_seqlens is not None:

        def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **states) -> tuple[Tensor, Tensor | None]:
            return chunk_ssd(x, dt, A, B, C, D=D, **states)

        return over_segments(recurrence, (x, dt, B, C), cu_seqlens, initial_state, output_final_state)
    num_tokens, num_groups, dtype = x.shape[1], B.shape[2], compute_dtype(x)
    chunk = _chunk_size(num_tokens, B.shape[-1])
    dt, A = dt.to(dtype), A.to(dtype)
    values = _into_chunks((dt[..., None] * x).unflatten(2, (num_groups, -1)), chunk)  # [B, G, n, c, R, P]
    decays = _into_chunks((dt * A).unflatten(2, (num_groups, -1)), chunk)  # [B, G, n, c, R]
    keys, queries = (_into_chunks(tensor.to(dtype), chunk) for tensor in (B, C))  # [B, G, n, c, N]
    output, prefix, suffix, total = _within_chunks(queries, keys, values, decays)
    updates = keys.mT @ (suffix[..., None] * values).flatten(-2)  # [B, G, n, N, R * P]
    states, final_state = _across_chunks(updates, total.exp(), initial_state)
    output = torch.addcmul(output, prefix[..., None], (queries @ states).view_as(output))
    output = output.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2).flatten(2, 3)  # [B, T, H, P]
    if D is not None:
        output = torch.addcmul(output, D.to(dtype)[:, None], x.to(dtype))
    return output.to(x.dtype), final_state if output_final_state else None


def _chunk_size(num_tokens: int, state_size: int) -> int:
    """Half the state size, within bounds: the bigger the states, the fewer are kept. Chosen by measurement."""
    chunk = max(MIN_CHUNK, min(MAX_CHUNK, power_of_two(state_size) // 2))
    return max(2, min(chunk, power_of_two(num_tokens)))  # two blocks


def _into_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, G, ...] -> [B, G, n, c, ...], padded with zeros: such a token neither decays nor writes."""
    if x.shape[1] % chunk:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % chunk])
    return x.unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention inside each chunk: two blocks directly, then the right one reads the left one.

    A block keeps the decay from its start to each token (that token included), the decay after each token to its
    end, and its total log decay. Merging two blocks needs only products of these: no exponent is ever positive and
    no two sums of decays are subtracted, so nothing overflows and nothing cancels. The heads of a group share q k^T.

    Takes q, k [B, G, n, c, N], v [B, G, n, c, R, P], log_decay [B, G, n, c, R]; returns the output, shaped as v,
    both decays for the whole chunk [B, G, n, c, R], and its log decay [B, G, n, R].
    """
    q, k, v, log_decay = (tensor.unflatten(3, (2, -1)) for tensor in (q, k, v, log_decay))
    output, prefix, suffix, total = _within_blocks(q, k, v, log_decay)
    output_left, output_right = output.unbind(3)
    prefix_left, prefix_right = prefix.unbind(3)
    suffix_left, suffix_right = suffix.unbind(3)
    decay_left, decay_right = total.exp()[..., None, :].unbind(3)
    read = q[:, :, :, 1] @ k[:, :, :, 0].mT @ (suffix_left[..., None] * v[:, :, :, 0]).flatten(-2)
    output_right = torch.addcmul(output_right, prefix_right[..., None], read.view_as(output_right))
    output = torch.cat((output_left, output_right), dim=3)
    prefix = torch.cat((prefix_left, prefix_right * decay_left), dim=3)
    suffix = torch.cat((suffix_left * decay_right, suffix_right), dim=3)
    return output, prefix, suffix, total.sum(3)


def _within_blocks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_within_chunks` keeps of each block, from and to [B, G, n, 2, c / 2, ...]; the total is [B, G, n, 2, R]."""
    size = q.shape[-2]
    spans = _spans(size, q.dtype, q.device)  # [size (to), size (from), size]
    log_decay = log_decay.transpose(-1, -2)  # [B, G, n, 2, R, size]
    decays = (log_decay @ spans.flatten(0, 1).T).exp().unflatten(-1, (size, size))
    weights = (q @ k.mT * q.new_ones(size, size).tril())[..., None, :, :] * decays
    output = (weights @ v.transpose(-2, -3)).transpose(-2, -3)
    prefix = (decays[..., 0] * log_decay[..., :1].exp()).transpose(-1, -2)
    suffix = decays[..., -1, :].transpose(-1, -2)
    return output, prefix, suffix, log_decay.sum(-1)


def _spans(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[t, s, j]: 1 where s < j <= t, so that a product with log decays sums those that token t sees of token s."""
    j = torch.arange(size, device=device)
    return ((j > j[:, None]) & (j <= j[:, None, None])).to(dtype)


def _across_chunks(updates: Tensor, decays: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State at the start of each chunk [B, G, n, N, R * P], and after the last as [B, H, P, N].

    Takes updates [B, G, n, N, R * P], decays [B, G, n, R] and the initial state [B, H, P, N].
    """
    num_groups, heads_per_group = decays.shape[1], decays.shape[-1]
    updates = updates.unflatten(-1, (heads_per_group, -1))  # [B, G, n, N, R, P]
    if initial_state is None:
        state = torch.zeros_like(updates[:, :, 0])
    else:
        state = initial_state.to(updates.dtype).unflatten(1, (num_groups, -1)).movedim(-1, 2)
    states = []
    for update, decay in zip(updates.unbind(2), decays[:, :, :, None, :, None].unbind(2), strict=True):
        states.append(state)
        state = torch.addcmul(update, decay, state)
    return torch.stack(states, dim=2).flatten(-2), state.movedim(2, -1).flatten(1, 2)
