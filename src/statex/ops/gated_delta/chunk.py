"""The gated delta rule in chunks: plain PyTorch with autograd, any device.

Shape letters: B batch, T time, H heads, K key dim, V value dim; N chunks of C tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.ops.segments import compute_dtype, full_precision, over_segments, power_of_two

MAX_CHUNK = 64


@full_precision
def chunk_gated_delta(
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

    Sources: arXiv 2412.06464, equation 10 and section 3.3; a decay for each channel: arXiv 2510.26692, equation 1.

    Args:
        q, k: [B, T, H, K]; beta_t |k_t|^2 above 2 makes the state grow without bound.
        v: [B, T, H, V].
        log_decay: [B, T, H], or [B, T, H, K] for one per key channel; <= 0, natural logarithm.
        beta: [B, T, H], how much of what the state has for a key is replaced: 0 to 1, or to 2.
        scale: factor on the output, K**-0.5 by default.
        initial_state: [B, H, K, V], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; B must be 1 and the states are
            [S, H, K, V]. The state is reset at each border.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state or None. The arithmetic and the states are
        fp32 (fp64 for fp64 inputs).
    """
    return in_chunks(
        across_chunks,
        inverse_of_unit_lower,
        *(q, k, v, log_decay, beta),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def in_chunks(
    across_chunks: Callable[..., tuple[Tensor, Tensor, Tensor]],
    inverse_of: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta` with a walk over the chunks and an inverse that are called as those below are.

    Args:
        operands: dtype of what is multiplied, that of the arithmetic by default; sums, decays, the inverse and the
            states are in that of the arithmetic in any case.
    """
    inputs = q, k, v, log_decay, beta
    if cu_seqlens is not None:
        recurrence = partial(in_chunks, across_chunks, inverse_of, scale=scale, operands=operands)
        return over_segments(recurrence, inputs, cu_seqlens, initial_state, output_final_state)
    num_tokens, num_heads = q.shape[1:3]
    chunk, dtype = min(MAX_CHUNK, power_of_two(num_tokens)), compute_dtype(v)
    operands = dtype if operands is None else operands
    queries, keys, values = (into_chunks(x.to(operands), chunk) for x in (q, k, v))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    decays, betas = (into_chunks(x.to(dtype), chunk) for x in (log_decay, beta[..., None]))
    prefix, suffix = decays.cumsum(-2).exp(), sum_after(decays).exp()  # through each token; after it
    total = prefix[..., -1, :, None]
    if log_decay.shape[-1] == 1:
        reads, overlaps = _pairs(queries, keys, decays)
        inverse = inverse_of(betas * overlaps) * betas.mT
        removed = product(inverse * prefix.mT, keys, operands)
    else:
        reads, overlaps = _pairs_by_channel(queries.to(dtype), keys.to(dtype), decays)
        inverse = inverse_of(betas * overlaps) * betas.mT
        removed = product(inverse, prefix * keys, operands)
        queries, keys, prefix, suffix = prefix * queries, suffix * keys, torch.ones_like(betas), torch.ones_like(betas)
    state = None if initial_state is None else initial_state.to(dtype).flatten(0, 1)
    removed, keys, queries = (x.to(operands) for x in (removed, keys, queries))
    written_alone = product(inverse, values, operands)
    output, written, state = across_chunks(written_alone, removed, keys, queries, suffix, total, state)
    output = scale * (prefix.flatten(0, 1) * output + product(reads.flatten(0, 1), written, operands))
    output = output.view(-1, num_heads, queries.shape[2] * chunk, v.shape[-1])[:, :, :num_tokens].transpose(1, 2)
    return output.to(v.dtype), state.unflatten(0, (-1, num_heads)) if output_final_state else None


def product(a: Tensor, b: Tensor, operands: torch.dtype) -> Tensor:
    """a @ b of [..., M, K] and [..., K, N] with both rounded to a dtype, but the sums, as their gradients', in fp32."""
    return _Product.apply(a, b, operands) if operands == torch.bfloat16 else a @ b


class _Product(torch.autograd.Function):
    """A product of bf16 matrices in fp32; each gradient is in the dtype of what was given."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, operands: torch.dtype) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.to(operands), b.to(operands)
        ctx.save_for_backward(a, b)
        return _summed_in_fp32(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        gradient = gradient.to(a.dtype)
        d_a, d_b = _summed_in_fp32(gradient, b.mT), _summed_in_fp32(a.mT, gradient)
        return d_a.to(ctx.dtypes[0]), d_b.to(ctx.dtypes[1]), None


def _summed_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cuda:  # where PyTorch has no such product
        return a.float() @ b.float()
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product.view(*a.shape[:-1], b.shape[-1])


def into_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> [B, H, N, C, D], padded with zeros: such a token neither decays nor writes."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def sum_after(x: Tensor) -> Tensor:
    """Sums over the tokens behind each, of [..., C, D]; no two sums are subtracted, so nothing cancels."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _pairs(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What each token t reads of each s <= t of its chunk, and the overlap of its key with that of each s < t.

    Takes q, k [..., C, K] and log_decay [..., C, 1]; returns two [..., C, C], lower triangular.
    """
    size = q.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)  # [t, s]: t comes after s
    spans = log_decay.expand(*log_decay.shape[:-1], size).masked_fill(~later, 0).cumsum(-2)
    decays = spans.masked_fill(later.T, -torch.inf).exp()
    reads, overlaps = (product(x, k.mT, x.dtype) for x in (q, k))
    return reads * decays, overlaps * decays.tril(-1)


def _pairs_by_channel(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The same with log_decay [..., C, K].

    Neighbouring blocks of 1, 2, 4, ... tokens are joined: the right one sees the left one decayed to the border by its
    own tokens, and from there on by those of the right one. No exponent is positive, so nothing overflows.
    """
    size = q.shape[-2]
    reads = (q * k).sum(-1)[..., None, None]  # [..., C, 1, 1]
    overlaps = torch.zeros_like(reads)
    block = 1
    while block < size:
        queries, keys, decays = (x.unflatten(-2, (-1, 2, block)) for x in (q, k, log_decay))
        left, right = decays.unbind(-3)
        seen = sum_after(left).exp() * keys[..., 0, :, :]
        to_token = right.cumsum(-2).exp()
        rows = torch.cat((to_token * queries[..., 1, :, :], to_token * keys[..., 1, :, :]), dim=-2)
        below = (rows @ seen.mT).unflatten(-2, (2, block))  # [..., blocks, 2, block, block]
        reads, overlaps = join_blocks(reads, below[..., 0, :, :]), join_blocks(overlaps, below[..., 1, :, :])
        block *= 2
    return reads.squeeze(-3), overlaps.squeeze(-3)


def join_blocks(diagonal: Tensor, below: Tensor) -> Tensor:
    """Blocks [..., 2 n, c, c] on the diagonal and what stands below each second one, to [..., n, 2 c, 2 c]."""
    upper, lower = diagonal.unflatten(-3, (-1, 2)).unbind(-3)
    upper = F.pad(upper, (0, upper.shape[-1]))
    return torch.cat((upper, torch.cat((below, lower), dim=-1)), dim=-2)


def inverse_of_unit_lower(strictly_lower: Tensor) -> Tensor:
    """Inverses of I + L, of L [..., C, C]."""
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(
        strictly_lower, identity.expand_as(strictly_lower), upper=False, unitriangular=True
    )


def across_chunks(
    values: Tensor, removed: Tensor, keys: Tensor, queries: Tensor, after: Tensor, decays: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the state over the chunks.

    Args:
        values: [B, H, N, C, V], what each token writes if the state is zero at its chunk's start.
        removed: [B, H, N, C, K]; times that state, what it writes less.
        keys, queries: [B, H, N, C, K].
        after: [B, H, N, C, 1], by what each token's writing has decayed at the chunk's end.
        decays: [B, H, N, 1 or K, 1], of a chunk.
        state: [B * H, K, V], or None for zeros.

    Returns:
        what is read of the states [B * H, N, C, V], what is written [B * H, N, C, V], and the last state.
    """
    if state is None:
        state = values.new_zeros(values.shape[:2].numel(), keys.shape[-1], values.shape[-1])
    outputs, written = [], []
    chunks = (x.flatten(0, 1).unbind(1) for x in (values, removed, (after * keys).mT, queries, decays))
    for value, removal, key, query, decay in zip(*chunks, strict=True):
        outputs.append(query @ state)
        written.append(torch.baddbmm(value, removal, state, alpha=-1))
        state = torch.baddbmm(decay * state, key, written[-1])
    return torch.stack(outputs, dim=1), torch.stack(written, dim=1), state
