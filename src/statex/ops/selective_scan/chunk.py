"""The selective scan (Mamba) in chunks: plain PyTorch, any device.

Each element of the state has a decay of its own, so that a chunk is no product of matrices, as Mamba2's is. The decays
of many tokens are computed at once, and the recurrence is then one operation for each token. Where a state is too small
to occupy the machine, chunks run side by side: first each from a zero state, which gives what every chunk begins with,
then from that. Only decays appear, never their inverses, so nothing overflows. One state every few tokens is kept for
the backward pass, which computes the others again.

Shape letters: B batch, T time, D channels, N state size; n chunks of L tokens, R = B * n rows; c tokens of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from statex.ops.operators import needs_gradients
from statex.ops.segments import compute_dtype, full_precision, over_segments, power_of_two

BUSY = {"cpu": 2**13, "cuda": 2**20}
"""Elements that keep a device busy for as long as it takes to launch an operation on them; the CPU's is measured."""
MIN_BLOCK, MAX_BLOCK = 16, 64


@full_precision
def chunk_selective_scan(
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
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t  (arXiv 2312.00752, equation 2).

    Args:
        x: [B, T, D].
        dt: [B, T, D], after softplus: positive.
        A: [D, N], negative.
        B, C: [B, T, N].
        D: [D] or None.
        initial_state: [B, D, N], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; the batch must be 1 and the states
            are [S, D, N]. The state is reset at each border.

    Returns:
        output [B, T, D] in the dtype of x, and the final state or None. The arithmetic and the states are
        fp32 (fp64 for fp64 inputs). Gradients are those of a first derivative only.
    """
    if cu_seqlens is not None:

        def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **states) -> tuple[Tensor, Tensor | None]:
            return chunk_selective_scan(x, dt, A, B, C, D=D, **states)

        return over_segments(recurrence, (x, dt, B, C), cu_seqlens, initial_state, output_final_state)
    batch, num_tokens, dtype = *x.shape[:2], compute_dtype(x)
    A, dt, values = A.to(dtype), dt.to(dtype), x.to(dtype)
    initial = x.new_zeros(batch, *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    chunks = _num_chunks(num_tokens, initial)
    inputs = (_into_chunks(tensor, chunks) for tensor in (dt * values, dt, B.to(dtype), C.to(dtype)))
    output, final_state = _Scan.apply(*inputs, A, initial, needs_gradients(x, dt, A, B, C, initial))
    output = output.unflatten(1, (batch, chunks)).permute(1, 2, 0, 3).flatten(1, 2)[:, :num_tokens]
    if D is not None:
        output = torch.addcmul(output, D.to(dtype), values)
    return output.to(x.dtype), final_state if output_final_state else None


def _num_chunks(num_tokens: int, state: Tensor) -> int:
    """As many chunks as keep the device busy, and about the root of the number of tokens at most. Several are twice the
    work of one."""
    busy = BUSY.get(state.device.type, BUSY["cuda"]) // state.numel()
    return max(1, min(busy, math.isqrt(num_tokens)))


def _into_chunks(x: Tensor, chunks: int) -> Tensor:
    """[B, T, ...] -> [L, R, ...], padded with zeros: such a token neither decays nor writes."""
    x = F.pad(x, (0, 0, 0, -x.shape[1] % chunks)).unflatten(1, (chunks, -1))
    return x.permute(2, 0, 1, 3).flatten(1, 2)


class _Scan(torch.autograd.Function):
    """The recurrence of writes [L, R, D], dt [L, R, D], B and C [L, R, N], A [D, N] and an initial state [B, D, N].

    Returns the output [L, R, D] and the final state [B, D, N].
    """

    @staticmethod
    def forward(
        ctx: Any, writes: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor]:
        state, blocks, shape = initial, _blocks(dt, A), (len(initial), -1)
        if dt.shape[1] > len(initial):
            ends = initial.new_zeros(dt.shape[1], *A.shape)
            for block in blocks:
                ends = _states(writes[block], dt[block], B[block], A, ends)[1][-1]
            state = _carried(initial, ends.unflatten(0, shape), _shares(dt, A).unflatten(0, shape)).flatten(0, 1)
        outputs, begins = [], []
        for block in blocks:
            begins.append(state)
            states = _states(writes[block], dt[block], B[block], A, state)[1]
            outputs.append(torch.einsum("trdn,trn->trd", states, C[block]))
            state = states[-1].clone()
        if keep:
            ctx.save_for_backward(writes, dt, B, C, A, torch.stack(begins))
        ctx.shape = shape
        return torch.cat(outputs), state.unflatten(0, shape)[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        writes, dt, B, C, A, begins = ctx.saved_tensors
        blocks, carry = _blocks(dt, A), d_final
        if dt.shape[1] > len(d_final):
            d_begins = torch.zeros_like(begins[0])
            for block in reversed(blocks):
                _, d_begins = _state_gradients(_decays(dt[block], A), C[block], d_output[block], d_begins)
            # From the last chunk to the first
            ends, shares = (x.unflatten(0, ctx.shape).flip(1) for x in (d_begins, _shares(dt, A)))
            carry = _carried(d_final, ends, shares).flip(1).flatten(0, 1)
        d_A, found = torch.zeros_like(A), []
        for block, begin in zip(reversed(blocks), begins.flip(0), strict=True):
            inputs = writes[block], dt[block], B[block], C[block], A, begin
            *gradients, of_A, carry = _block_gradients(*inputs, d_output[block], carry)
            found.append(gradients)
            d_A += of_A
        d_writes, d_dt, d_B, d_C = (torch.cat(parts[::-1]) for parts in zip(*found, strict=True))
        return d_writes, d_dt, d_B, d_C, d_A, carry.unflatten(0, ctx.shape)[:, 0], None


def _carried(first: Tensor, ends: Tensor, shares: Tensor) -> Tensor:
    """[B, n, D, N]: what each chunk begins with, if it ends with `ends` after beginning with 0.

    Takes what the first begins with, [B, D, N], and `ends` and `shares` [B, n, D, N].
    """
    begins = [first]
    for end, share in zip(ends[:, :-1].unbind(1), shares[:, :-1].unbind(1), strict=True):
        begins.append(torch.addcmul(end, share, begins[-1]))
    return torch.stack(begins, dim=1)


def _blocks(dt: Tensor, A: Tensor) -> list[slice]:
    """The tokens of a chunk in blocks, whose states exist at one time. One state in each is kept for the backward pass:
    the larger the states, the fewer."""
    size = max(MIN_BLOCK, min(MAX_BLOCK, power_of_two(A.shape[1])))
    return [slice(start, start + size) for start in range(0, len(dt), size)]


def _decays(dt: Tensor, A: Tensor) -> Tensor:
    """[c, R, D, N]: what is left of each element of the state after each token."""
    return (dt[..., None] * A).exp_()


def _shares(dt: Tensor, A: Tensor) -> Tensor:
    """[R, D, N]: what is left of what each chunk began with at its end."""
    return _decays(dt.sum(0), A)


def _states(writes: Tensor, dt: Tensor, B: Tensor, A: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """The decays of a block's tokens and the states after them, [c, R, D, N] each."""
    decays, states = _decays(dt, A), writes[..., None] * B[..., None, :]
    for decay, state in zip(decays, states, strict=True):
        begin = state.addcmul_(decay, begin)
    return decays, states


def _state_gradients(decays: Tensor, C: Tensor, d_output: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in the states after each token of a block, and in the one before it.

    `carry` is the one in the last state that comes from behind the block.
    """
    gradients = d_output[..., None] * C[..., None, :]
    after = gradients[-1].add_(carry)
    for decay, gradient in zip(decays.unbind()[:0:-1], gradients.unbind()[-2::-1], strict=True):
        after = gradient.addcmul_(decay, after)
    return gradients, decays[0] * after


def _block_gradients(
    writes: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, begin: Tensor, d_output: Tensor, carry: Tensor
) -> tuple[Tensor, ...]:
    """Gradients in writes, dt, B, C and A, of a block that began with `begin`, and in `begin`."""
    decays, states = _states(writes, dt, B, A, begin)
    gradients, carry = _state_gradients(decays, C, d_output, carry)
    d_writes = torch.einsum("trdn,trn->trd", gradients, B)
    d_B, d_C = (torch.einsum("trd,trdn->trn", *pair) for pair in ((writes, gradients), (d_output, states)))
    exponents = decays.mul_(gradients)  # their gradients: those of the states times what the decays have left of them
    exponents[0] *= begin
    exponents[1:] *= states[:-1]
    d_dt = (exponents * A).sum(-1)
    return d_writes, d_dt, d_B, d_C, exponents.mul_(dt[..., None]).sum((0, 1)), carry
