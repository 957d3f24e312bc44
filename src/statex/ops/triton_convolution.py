"""The causal depthwise convolution of a few taps on the GPU, with its bias and SiLU, forward and backward.

It moves little more than its inputs and outputs: the taps of neighbouring tokens are read again from the caches.
Shape letters: B batch, T time, D channels, W taps, L tokens of left context.
"""

# mypy: disable-error-code="assignment"
# (kernels grow tuples, tap by tap)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.operators import absent, define

TILE_TOKENS, TILE_CHANNELS = 16, 128
GRADIENT_TOKENS, GRADIENT_TILES = 8, 32  # of a tile whose sums stay in registers, and tiles of one program


@triton.jit
def _tap(
    x, context, seq_idx, row, tokens, cols, DISTANCE: tl.constexpr, T, L, D: tl.constexpr,
    stride_b, stride_t, context_b, context_t, HAS_CONTEXT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The inputs DISTANCE tokens before (after, where it is negative) those of a tile, fp32; 0 outside of the row and
    in another document than the tile's token."""
    at = tokens - DISTANCE
    inside = (at >= 0) & (at < T) & (tokens >= 0) & (tokens < T)
    if HAS_SEGMENTS and DISTANCE != 0:
        there = tl.load(seq_idx + row * T + at, mask=inside, other=0)
        inside = inside & (there == tl.load(seq_idx + row * T + tokens, mask=inside, other=0))
    here = x + row * stride_b + at.to(tl.int64)[:, None] * stride_t + cols[None, :]
    tile = tl.load(here, mask=inside[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    if HAS_CONTEXT and DISTANCE > 0:
        inside = (at < 0) & (at >= -L)
        here = context + row * context_b + (L + at).to(tl.int64)[:, None] * context_t + cols[None, :]
        tile += tl.load(here, mask=inside[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["T", "L"])
def convolution_kernel(
    x, weight, bias, context, seq_idx, out, T, L, stride_b, stride_t, context_b, context_t,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_SEGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """BT tokens of BD channels of one row; out is contiguous.

    TRANSPOSED: the gradient of the inputs, out of x = the gradient before the activation; without bias and SiLU.
    """
    tiles_d: tl.constexpr = (D + BD - 1) // BD
    tokens = tl.program_id(0) // tiles_d * BT + tl.arange(0, BT)
    cols = tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    result = tl.zeros((BT, BD), tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        taps = tl.load(weight + cols * W + w, mask=cols < D, other=0.0).to(tl.float32)
        result += taps[None, :] * _tap(
            x, context, seq_idx, row, tokens, cols, w - (W - 1) if TRANSPOSED else W - 1 - w, T, L, D,
            stride_b, stride_t, context_b, context_t, HAS_CONTEXT, HAS_SEGMENTS,
        )  # fmt: skip
    if not TRANSPOSED:
        result *= tl.sigmoid(result)
    at = (row * T + tokens)[:, None] * D + cols[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(tokens < T)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def convolution_gradient_kernel(
    x, weight, bias, seq_idx, d_out, d_sum, d_weight, T, stride_b, stride_t, d_out_b, d_out_t,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """TILES * BT tokens of BD channels of one row: the gradient before the activation, d_sum [B, T, D], and its sums
    with each tap's inputs, the last alone (the bias): d_weight [programs per channel, W + 1, D] fp32."""
    tiles_d: tl.constexpr = (D + BD - 1) // BD
    part, row = tl.program_id(0) // tiles_d, tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)
    offset = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    sums = ()
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + cols * W + w, mask=cols < D, other=0.0).to(tl.float32),)
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros((BT, BD), tl.float32),)
    for tile in range(TILES):
        tokens = (part * TILES + tile) * BT + tl.arange(0, BT)
        inside = (tokens < T)[:, None] & (cols < D)[None, :]
        inputs = ()
        total = tl.zeros((BT, BD), tl.float32) + offset[None, :]
        for w in tl.static_range(W):
            inputs += (
                _tap(
                    x, x, seq_idx, row, tokens, cols, W - 1 - w, T, 0, D, stride_b, stride_t, 0, 0, False, HAS_SEGMENTS
                ),
            )  # fmt: skip
            total += taps[w][None, :] * inputs[w]
        here = d_out + row * d_out_b + tokens.to(tl.int64)[:, None] * d_out_t + cols[None, :]
        gradient = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(total)
        gradient *= gate * (1 + total * (1 - gate))
        at = (row * T + tokens)[:, None] * D + cols[None, :]
        tl.store(d_sum + at, gradient.to(d_sum.dtype.element_ty), mask=inside)
        inputs += (tl.full((BT, BD), 1.0, tl.float32),)
        added = ()
        for w in tl.static_range(W + 1):
            added += (sums[w] + gradient * inputs[w],)
        sums = added
    parts = (T + TILES * BT - 1) // (TILES * BT)
    for w in tl.static_range(W + 1):
        at = ((row * parts + part) * (W + 1) + w) * D + cols
        tl.store(d_weight + at, tl.sum(sums[w], 0), mask=cols < D)


@triton.jit
def step_kernel(
    x, state, weight, bias, out, stride_b,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One token of BD channels of one row; the state [B, D, W] moves on by it."""
    cols, taps = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BW)
    row = tl.program_id(1).to(tl.int64)
    inside = (cols < D)[:, None] & (taps < W)[None, :]
    at = (row * D + cols)[:, None] * W + taps[None, :]
    before = tl.load(state + at + 1, mask=inside & (taps < W - 1)[None, :], other=0.0)
    new = tl.load(x + row * stride_b + cols, mask=cols < D, other=0.0).to(state.dtype.element_ty)
    inputs = tl.where((taps == W - 1)[None, :], new[:, None], before)
    tl.debug_barrier()  # a number is read by another thread than the one that overwrites it
    tl.store(state + at, inputs, mask=inside)
    factors = tl.load(weight + cols[:, None] * W + taps[None, :], mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(inputs.to(tl.float32) * factors, 1)
    if HAS_BIAS:
        result += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    result *= tl.sigmoid(result)
    tl.store(out + row * D + cols, result.to(out.dtype.element_ty), mask=cols < D)


class _Convolution(torch.autograd.Function):
    """The convolution where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return _forward(x, weight, bias, seq_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = x, weight, bias, seq_idx = ctx.saved_tensors
        return _gradients(ctx, saved, _backward(d_out, x, weight, bias, seq_idx, ctx.needs_input_grad[0]))


def triton_short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    left_context: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Arguments and result are those of `short_convolution`, on CUDA. x may have any strides over rows and tokens."""
    if seq_idx is not None:
        left_context = None  # what was before belongs to no document of the row
    if not torch.is_grad_enabled():
        return _convolve(x, weight, bias, left_context, seq_idx, transposed=False)
    convolution = _operator if torch.compiler.is_compiling() else _Convolution.apply
    if left_context is None:
        return convolution(x, weight, bias, seq_idx)
    joined = torch.cat([left_context.to(x.dtype), x], dim=1)
    return convolution(joined, weight, bias, None)[:, left_context.shape[1] :]


def triton_short_convolution_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments and result are those of `short_convolution_step`, on CUDA."""
    B, D, W = state.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    work = state.contiguous()  # the state itself where it is contiguous already
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        step_kernel[(triton.cdiv(D, TILE_CHANNELS), B)](
            x, work, weight.contiguous(), bias, out, x.stride(0),
            D=D, W=W, BD=TILE_CHANNELS, BW=triton.next_power_of_2(W), HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    if work is not state:
        state.copy_(work)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, seq_idx: Tensor | None, transposed: bool
) -> Tensor:
    B, T, D = x.shape
    x, weight = _channels_last(x), weight.contiguous()
    context = _channels_last(context) if context is not None else None
    seq_idx = seq_idx.contiguous() if seq_idx is not None else None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(T, TILE_TOKENS) * triton.cdiv(D, TILE_CHANNELS), B)
    with torch.cuda.device_of(x):
        convolution_kernel[grid](
            x, weight, bias, context, seq_idx, out, T, 0 if context is None else context.shape[1],
            x.stride(0), x.stride(1), *((0, 0) if context is None else context.stride()[:2]),
            D=D, W=weight.shape[1], BT=TILE_TOKENS, BD=TILE_CHANNELS, HAS_BIAS=bias is not None,
            HAS_CONTEXT=context is not None, HAS_SEGMENTS=seq_idx is not None, TRANSPOSED=transposed, num_warps=4,
        )  # fmt: skip
    return out


def _gradient_of_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient before the activation, [B, T, D], and of the taps and the bias, [W + 1, D] fp32."""
    B, T, D = x.shape
    W = weight.shape[1]
    x, d_out, weight = _channels_last(x), _channels_last(d_out), weight.contiguous()
    seq_idx = seq_idx.contiguous() if seq_idx is not None else None
    d_sum = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = triton.cdiv(T, GRADIENT_TOKENS * GRADIENT_TILES)
    sums = torch.empty(B * parts, W + 1, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        convolution_gradient_kernel[(parts * triton.cdiv(D, TILE_CHANNELS), B)](
            x, weight, bias, seq_idx, d_out, d_sum, sums, T, x.stride(0), x.stride(1), d_out.stride(0), d_out.stride(1),
            D=D, W=W, BT=GRADIENT_TOKENS, BD=TILE_CHANNELS, TILES=GRADIENT_TILES, HAS_BIAS=bias is not None,
            HAS_SEGMENTS=seq_idx is not None, num_warps=4,
        )  # fmt: skip
    return d_sum, sums.sum(0)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias, None, seq_idx, transposed=False)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, where it is needed, and of the taps and the bias, [W + 1, D] fp32."""
    d_sum, sums = _gradient_of_sum(x, weight, bias, seq_idx, d_out)
    return _convolve(d_sum, weight, None, None, seq_idx, transposed=True) if needs_dx else absent(x), sums


def _fake_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    sums = weight.new_empty(weight.shape[1] + 1, weight.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape) if needs_dx else absent(x), sums


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx"
_operator = define(f"short_convolution({_INPUTS}) -> Tensor", _forward, _fake_forward)
_backward_operator = define(
    f"short_convolution_backward(Tensor d_out, {_INPUTS}, bool needs_dx) -> (Tensor, Tensor)", _backward, _fake_backward
)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, saved: tuple[Tensor | None, ...], of_sums: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and seq_idx, from what the backward kernels make.

    `ctx.saved_tensors` is read once, by the caller: gradient checkpointing hands each tensor out a single time.
    """
    (_, weight, bias, _), (dx, sums) = saved, of_sums
    assert weight is not None
    d_bias = sums[-1].to(bias.dtype) if bias is not None else None
    return dx if ctx.needs_input_grad[0] else None, sums[:-1].T.to(weight.dtype), d_bias, None


def _operator_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    return _gradients(ctx, saved, _backward_operator(d_out, *saved, ctx.needs_input_grad[0]))


torch.library.register_autograd("statex::short_convolution", _operator_gradients, setup_context=_save)
