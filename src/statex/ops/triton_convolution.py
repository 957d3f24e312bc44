"""The causal depthwise convolution of a few taps on the GPU, with its bias and SiLU, forward and backward.

It moves little more than its inputs and outputs: a thread walks along a strip of tokens, and what neighbouring tokens
share stays in its registers, so that only the few tokens around a strip are read twice.
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

from statex.ops.operators import absent, contiguous, define
from statex.ops.triton_sigmoid import sigmoid

TILE_CHANNELS = 128
STRIPS, GROUP = 4, 4  # side by side in a program, a warp each; and tokens of a strip that are loaded at once
LONG_STRIP, SHORT_STRIP = 64, 16  # tokens: the longer, the fewer are read twice
ENOUGH = 2**24  # numbers, for long strips to keep all of a GPU busy
REGISTERS = 168  # of a thread of the gradient, at most, so that three programs share a multiprocessor


@triton.jit
def _next(x, at, tokens, cols, stride_t, T, step, D: tl.constexpr, COUNT: tl.constexpr):
    """Tiles of COUNT tokens from `step` on, behind `tokens`, where `at` points to; 0 outside of the row."""
    tiles = ()
    for u in tl.static_range(COUNT):
        token = tokens + (step + u)
        inside = ((token >= 0) & (token < T))[:, None] & (cols < D)[None, :]
        tiles += (tl.load(x + at + (step + u) * stride_t, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _document(seq_idx, row, tokens, T, HAS_SEGMENTS: tl.constexpr):
    """The document of each token; the same for all tokens where documents are not told apart."""
    found = tokens * 0
    if HAS_SEGMENTS:
        found = tl.load(seq_idx + row * T + tokens, mask=(tokens >= 0) & (tokens < T), other=-1).to(tl.int32)
    return found


@triton.jit
def _moved(window, new, W: tl.constexpr):
    """The last W - 1 of a window and what follows it."""
    moved = ()
    for w in tl.static_range(1, W - 1):
        moved += (window[w],)
    if W > 1:
        moved += (new,)
    return moved


@triton.jit
def _within(window, documents, here, W: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """A window of W - 1, 0 where another document was."""
    kept = window
    if HAS_SEGMENTS:
        kept = ()
        for w in tl.static_range(W - 1):
            kept += (tl.where((documents[w] == here)[:, None], window[w], 0.0),)
    return kept


@triton.jit(do_not_specialize=["T", "L"])
def convolution_kernel(
    x, weight, bias, context, seq_idx, out, T, L, stride_b, stride_t, context_b, context_t,
    D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """BR strips of S tokens of BD channels of one row; out is contiguous. Threads walk along the strips: the inputs of
    the taps are in their registers, and the next U tokens on their way."""
    tiles_d: tl.constexpr = (D + BD - 1) // BD
    tokens = (tl.program_id(0) // tiles_d * BR + tl.arange(0, BR)) * S
    cols = tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    at = row * stride_b + tokens.to(tl.int64)[:, None] * stride_t + cols[None, :]
    at_out = (row * T + tokens)[:, None] * D + cols[None, :]
    offset = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    taps, window, documents = (), (), ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + cols * W + w, mask=cols < D, other=0.0).to(tl.float32),)
    for w in tl.static_range(W - 1):
        before = _next(x, at, tokens, cols, stride_t, T, w - (W - 1), D, 1)[0].to(tl.float32)
        if HAS_CONTEXT:
            there = tokens + (w - (W - 1))
            inside = ((there < 0) & (there >= -L))[:, None] & (cols < D)[None, :]
            here = context + row * context_b + (L + there).to(tl.int64)[:, None] * context_t + cols[None, :]
            before += tl.load(here, mask=inside, other=0.0).to(tl.float32)
        window += (before,)
        documents += (_document(seq_idx, row, tokens + (w - (W - 1)), T, HAS_SEGMENTS),)
    ahead = _next(x, at, tokens, cols, stride_t, T, 0, D, U)
    for step in range(0, S, U):
        new = ahead
        ahead = _next(x, at, tokens, cols, stride_t, tl.where(step + U < S, T, 0), step + U, D, U)
        for u in tl.static_range(U):
            token = tokens + (step + u)
            own = new[u].to(tl.float32)
            result = offset[None, :] + taps[W - 1][None, :] * own
            document = _document(seq_idx, row, token, T, HAS_SEGMENTS)
            inputs = _within(window, documents, document, W, HAS_SEGMENTS)
            for w in tl.static_range(W - 1):
                result += taps[w][None, :] * inputs[w]
            result *= sigmoid(result)
            inside = (token < T)[:, None] & (cols < D)[None, :]
            tl.store(out + at_out + (step + u) * D, result.to(out.dtype.element_ty), mask=inside)
            window, documents = _moved(window, own, W), _moved(documents, document, W)


@triton.jit
def _before_activation(window, own, gradient, taps, offset, W: tl.constexpr):
    """The gradient before the activation."""
    total = offset[None, :] + taps[W - 1][None, :] * own
    for w in tl.static_range(W - 1):
        total += taps[w][None, :] * window[w]
    gate = sigmoid(total)
    return gradient.to(tl.float32) * (gate * (1 + total * (1 - gate)))


@triton.jit
def _gradient_of_input(before, documents, last, document, taps, W: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """The gradient of the first of W tokens, from the gradients before the activation of all of them."""
    result = taps[0][None, :] * last
    if HAS_SEGMENTS and W > 1:
        result = tl.where((documents[0] == document)[:, None], result, 0.0)
    for w in tl.static_range(W - 1):
        part = taps[W - 1 - w][None, :] * before[w]
        if HAS_SEGMENTS and w > 0:
            part = tl.where((documents[0] == documents[w])[:, None], part, 0.0)
        result += part
    return result


@triton.jit(do_not_specialize=["T"])
def convolution_gradient_kernel(
    x, weight, bias, seq_idx, d_out, dx, d_weight, T, stride_b, stride_t, d_out_b, d_out_t,
    D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_DX: tl.constexpr,
):  # fmt: skip
    """As convolution_kernel: dx [B, T, D], and the sums of the gradient before the activation with each tap's inputs,
    the last alone (the bias): d_weight [programs per channel, W + 1, D] fp32. What a token's gradient needs of the
    W - 1 after it is in registers, too; S is at least W - 1."""
    tiles_d: tl.constexpr = (D + BD - 1) // BD
    part, row = tl.program_id(0) // tiles_d, tl.program_id(1).to(tl.int64)
    tokens = (part * BR + tl.arange(0, BR)) * S
    cols = tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)
    at = row * stride_b + tokens.to(tl.int64)[:, None] * stride_t + cols[None, :]
    at_d_out = row * d_out_b + tokens.to(tl.int64)[:, None] * d_out_t + cols[None, :]
    at_dx = (row * T + tokens)[:, None] * D + cols[None, :]
    offset = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    taps, sums, window, gradients, documents = (), (), (), (), ()
    for w in tl.static_range(W):
        taps += (tl.load(weight + cols * W + w, mask=cols < D, other=0.0).to(tl.float32),)
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros((BR, BD), tl.float32),)
    for w in tl.static_range(W - 1):
        window += (_next(x, at, tokens, cols, stride_t, T, w - (W - 1), D, 1)[0].to(tl.float32),)
        gradients += (tl.zeros((BR, BD), tl.float32),)
        documents += (_document(seq_idx, row, tokens + (w - (W - 1)), T, HAS_SEGMENTS),)
    ahead = _next(x, at, tokens, cols, stride_t, T, 0, D, U)
    d_ahead = _next(d_out, at_d_out, tokens, cols, d_out_t, T, 0, D, U)
    for step in range(0, S, U):
        new, d_new = ahead, d_ahead
        end = tl.where(step + U < S, T, 0)
        ahead = _next(x, at, tokens, cols, stride_t, end, step + U, D, U)
        d_ahead = _next(d_out, at_d_out, tokens, cols, d_out_t, end, step + U, D, U)
        for u in tl.static_range(U):
            own, document = new[u].to(tl.float32), _document(seq_idx, row, tokens + (step + u), T, HAS_SEGMENTS)
            inputs = _within(window, documents, document, W, HAS_SEGMENTS)
            gradient = _before_activation(inputs, own, d_new[u], taps, offset, W)
            added = ()
            for w in tl.static_range(W - 1):
                added += (sums[w] + gradient * inputs[w],)
            added += (sums[W - 1] + gradient * own, sums[W] + gradient)
            sums = added
            if HAS_DX:
                result = _gradient_of_input(gradients, documents, gradient, document, taps, W, HAS_SEGMENTS)
                inside = (tokens + (step + u - (W - 1)) < T)[:, None] & (cols < D)[None, :] & (step + u >= W - 1)
                here = dx + at_dx + (step + u - (W - 1)) * D
                tl.store(here, result.to(dx.dtype.element_ty), mask=inside)
            window, gradients = _moved(window, own, W), _moved(gradients, gradient, W)
            documents = _moved(documents, document, W)
    if HAS_DX and W > 1:  # the tokens after the strip, whose gradients reach into it
        new = _next(x, at, tokens, cols, stride_t, T, S, D, W - 1)
        d_new = _next(d_out, at_d_out, tokens, cols, d_out_t, T, S, D, W - 1)
        for u in tl.static_range(W - 1):
            own, document = new[u].to(tl.float32), _document(seq_idx, row, tokens + (S + u), T, HAS_SEGMENTS)
            inputs = _within(window, documents, document, W, HAS_SEGMENTS)
            gradient = _before_activation(inputs, own, d_new[u], taps, offset, W)
            result = _gradient_of_input(gradients, documents, gradient, document, taps, W, HAS_SEGMENTS)
            inside = (tokens + (S + u - (W - 1)) < T)[:, None] & (cols < D)[None, :]
            tl.store(dx + at_dx + (S + u - (W - 1)) * D, result.to(dx.dtype.element_ty), mask=inside)
            window, gradients = _moved(window, own, W), _moved(gradients, gradient, W)
            documents = _moved(documents, document, W)
    parts = (T + BR * S - 1) // (BR * S)
    for w in tl.static_range(W + 1):
        here = d_weight + ((row * parts + part) * (W + 1) + w) * D + cols
        tl.store(here, tl.sum(sums[w], 0), mask=cols < D)


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
    result *= sigmoid(result)
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
        return _convolve(x, weight, bias, left_context, seq_idx)
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
            x, work, weight.contiguous(), contiguous(bias), out, x.stride(0),
            D=D, W=W, BD=TILE_CHANNELS, BW=triton.next_power_of_2(W), HAS_BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    if work is not state:
        state.copy_(work)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strip(x: Tensor, taps: int) -> int:
    """Tokens of a strip of x [B, T, D]."""
    needed = triton.next_power_of_2(triton.cdiv(x.shape[1], STRIPS))
    longest = LONG_STRIP if x.numel() >= ENOUGH else SHORT_STRIP
    return max(min(needed, longest), GROUP, triton.next_power_of_2(taps))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    B, T, D = x.shape
    x, weight, strip = _channels_last(x), weight.contiguous(), _strip(x, weight.shape[1])
    context = _channels_last(context) if context is not None else None
    bias, seq_idx = contiguous(bias), contiguous(seq_idx)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        convolution_kernel[(triton.cdiv(T, strip * STRIPS) * triton.cdiv(D, TILE_CHANNELS), B)](
            x, weight, bias, context, seq_idx, out, T, 0 if context is None else context.shape[1],
            x.stride(0), x.stride(1), *((0, 0) if context is None else context.stride()[:2]),
            D=D, W=weight.shape[1], S=strip, BR=STRIPS, BD=TILE_CHANNELS, U=GROUP, HAS_BIAS=bias is not None,
            HAS_CONTEXT=context is not None, HAS_SEGMENTS=seq_idx is not None, num_warps=STRIPS,
        )  # fmt: skip
    return out


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias, None, seq_idx)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, T, D], where it is needed, and of the taps and the bias, [W + 1, D] fp32."""
    B, T, D = x.shape
    W, strip = weight.shape[1], _strip(x, weight.shape[1])
    x, d_out, weight = _channels_last(x), _channels_last(d_out), weight.contiguous()
    bias, seq_idx = contiguous(bias), contiguous(seq_idx)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else absent(x)
    parts = triton.cdiv(T, strip * STRIPS)
    sums = torch.empty(B * parts, W + 1, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        convolution_gradient_kernel[(parts * triton.cdiv(D, TILE_CHANNELS), B)](
            x, weight, bias, seq_idx, d_out, dx, sums, T, x.stride(0), x.stride(1), d_out.stride(0), d_out.stride(1),
            D=D, W=W, S=strip, BR=STRIPS, BD=TILE_CHANNELS, U=GROUP, HAS_BIAS=bias is not None,
            HAS_SEGMENTS=seq_idx is not None, HAS_DX=needs_dx, num_warps=STRIPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return dx, sums.sum(0)


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
