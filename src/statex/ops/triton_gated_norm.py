"""RMSNorm with a gate on the GPU, forward and backward: each reads its inputs once and writes its outputs once.

Shape letters: R rows (all dimensions but the last), D channels, G groups of them that are normalised together.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.operators import absent, contiguous, define
from statex.ops.triton_sigmoid import sigmoid

TILE, GRADIENT_TILE = 4096, 1024  # numbers of one program
FEW_ROWS = 1024  # up to which a program has one row, so that there are enough of them
GRADIENT_PROGRAMS = 4  # of each multiprocessor, about; each sums the weight's gradient over its rows


@triton.jit
def _gated(x, gate, at_x, at_gate, inside, HAS_GATE: tl.constexpr):
    """A tile of x, the gate and its sigmoid, fp32 (1 and 1 without a gate)."""
    inputs = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    gates = tl.full(inputs.shape, 1.0, tl.float32)
    opened = gates
    if HAS_GATE:
        gates = tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32)
        opened = sigmoid(gates)
    return inputs, gates, opened


@triton.jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    x, gate, weight, out, scales, rows, stride_x, stride_gate, eps,
    D: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """BR rows of one group of SIZE channels; scales [R, G] gets 1 / root mean square."""
    groups: tl.constexpr = D // SIZE
    group = tl.program_id(0) % groups
    numbers = tl.arange(0, BD)
    row = (tl.program_id(0) // groups * BR + tl.arange(0, BR)).to(tl.int64)
    cols = group * SIZE + numbers
    inside = (row < rows)[:, None] & (numbers < SIZE)[None, :]
    inputs, gates, opened = _gated(
        x, gate, row[:, None] * stride_x + cols[None, :], row[:, None] * stride_gate + cols[None, :], inside, HAS_GATE
    )
    if GATE_FIRST:
        inputs *= gates * opened
    scale = tl.rsqrt(tl.sum(inputs * inputs, 1) / SIZE + eps)
    result = inputs * scale[:, None]
    if HAS_WEIGHT:
        result *= tl.load(weight + cols, mask=numbers < SIZE, other=0.0).to(tl.float32)[None, :]
    if not GATE_FIRST:
        result *= gates * opened
    tl.store(scales + row * groups + group, scale, mask=row < rows)
    tl.store(out + row[:, None] * D + cols[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tiles_at(x, gate, d_out, row, cols, inside, stride_x, stride_gate, stride_d_out, HAS_GATE: tl.constexpr):
    """x, the gate (d_out without one) and d_out of some rows, as they are stored."""
    inputs = tl.load(x + row[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)
    gradient = tl.load(d_out + row[:, None] * stride_d_out + cols[None, :], mask=inside, other=0.0)
    gates = gradient
    if HAS_GATE:
        gates = tl.load(gate + row[:, None] * stride_gate + cols[None, :], mask=inside, other=0.0)
    return inputs, gates, gradient


@triton.jit(do_not_specialize=["rows", "tiles"])
def gated_norm_gradient_kernel(
    x, gate, weight, scales, d_out, dx, d_gate, d_weight, rows, tiles, stride_x, stride_gate, stride_d_out,
    D: tl.constexpr, SIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """`tiles` times BR rows of one group, the next on their way while BR are computed; d_weight [programs per group, D]
    fp32 gets the sums over them. GATE_FIRST only with a gate."""
    groups: tl.constexpr = D // SIZE
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    numbers = tl.arange(0, BD)
    cols = group * SIZE + numbers
    factors = tl.full((BD,), 1.0, tl.float32)
    if HAS_WEIGHT:
        factors = tl.load(weight + cols, mask=numbers < SIZE, other=0.0).to(tl.float32)
    sums = tl.zeros((BR, BD), tl.float32)
    row = (part * tiles * BR + tl.arange(0, BR)).to(tl.int64)
    inside = (row < rows)[:, None] & (numbers < SIZE)[None, :]
    ahead = _tiles_at(x, gate, d_out, row, cols, inside, stride_x, stride_gate, stride_d_out, HAS_GATE)
    for tile in range(tiles):
        inputs, gates, gradient = ahead
        following = row + BR
        coming = (following < tl.where(tile + 1 < tiles, rows, 0))[:, None] & (numbers < SIZE)[None, :]
        ahead = _tiles_at(x, gate, d_out, following, cols, coming, stride_x, stride_gate, stride_d_out, HAS_GATE)
        scale = tl.load(scales + row * groups + group, mask=row < rows, other=0.0)[:, None]
        inputs, gates, gradient = inputs.to(tl.float32), gates.to(tl.float32), gradient.to(tl.float32)
        opened = sigmoid(gates)
        slope = opened * (1 + gates * (1 - opened))
        at = row[:, None] * D + cols[None, :]
        if GATE_FIRST:
            normed = inputs * (gates * opened) * scale
        else:
            normed = inputs * scale
            if HAS_GATE:
                d_gates = gradient * normed * factors[None, :] * slope
                tl.store(d_gate + at, d_gates.to(d_gate.dtype.element_ty), mask=inside)
                gradient *= gates * opened
        sums += gradient * normed
        gradient *= factors[None, :]
        gradient = (gradient - normed * (tl.sum(gradient * normed, 1) / SIZE)[:, None]) * scale
        if GATE_FIRST:
            tl.store(d_gate + at, (gradient * inputs * slope).to(d_gate.dtype.element_ty), mask=inside)
            gradient *= gates * opened
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        row, inside = following, coming
    if HAS_WEIGHT:
        tl.store(d_weight + part * D + cols, tl.sum(sums, 0), mask=numbers < SIZE)


class _GatedNorm(torch.autograd.Function):
    """The norm where nothing is compiled."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, size: int, gate_first: bool
    ) -> Tensor:
        out, scales = _normalise(x, weight, gate, eps, size, gate_first)
        ctx.save_for_backward(x, weight, gate, scales)
        ctx.size, ctx.gate_first = size, gate_first
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, scales = ctx.saved_tensors
        return *_gradients(x, weight, gate, scales, d_out, ctx.size, ctx.gate_first), None, None, None


def triton_gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    gate_first: bool = False,
) -> Tensor:
    """Arguments and result are those of `gated_rms_norm`, on CUDA. The rows of x and gate may have any stride."""
    size = group_size or x.shape[-1]
    if torch.compiler.is_compiling():
        return _operator(x, weight, gate, eps, size, gate_first)[0]
    if not torch.is_grad_enabled():
        return _normalise(x, weight, gate, eps, size, gate_first)[0]
    return _GatedNorm.apply(x, weight, gate, eps, size, gate_first)


def _rows(x: Tensor) -> Tensor:
    """[R, D] with neighbouring channels side by side, a view where possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(rows: int, size: int, numbers: int, of_thread: int) -> tuple[int, int, int]:
    """Rows, channels and warps of a program of so many numbers, and of so many to a thread, of each tensor."""
    width = triton.next_power_of_2(size)
    height = 1 if rows <= FEW_ROWS else max(1, numbers // width)
    return height, width, max(1, min(16, height * width // (32 * of_thread)))


@lru_cache
def _most_programs(device: torch.device) -> int:
    """Of a gradient: so few that all of a multiprocessor's run at once, or one after another, and end together."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return GRADIENT_PROGRAMS * processors


def _normalise(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, size: int, gate_first: bool
) -> tuple[Tensor, Tensor]:
    """The result, and 1 / root mean square of each row and group [R, G] fp32."""
    x_rows, channels, weight = _rows(x), x.shape[-1], contiguous(weight)
    gates = _rows(gate) if gate is not None else None
    rows, groups = len(x_rows), channels // size
    height, width, warps = _tile(rows, size, TILE, 16)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        gated_norm_kernel[(triton.cdiv(rows, height) * groups,)](
            x_rows, gates, weight, out, scales, rows, x_rows.stride(0), 0 if gates is None else gates.stride(0), eps,
            D=channels, SIZE=size, BR=height, BD=width, HAS_GATE=gates is not None, HAS_WEIGHT=weight is not None,
            GATE_FIRST=gate_first and gates is not None, num_warps=warps,
        )  # fmt: skip
    return out, scales


def _gradients(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, scales: Tensor, d_out: Tensor, size: int, gate_first: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, weight and gate."""
    x_rows, d_rows, channels, weight = _rows(x), _rows(d_out), x.shape[-1], contiguous(weight)
    gates = _rows(gate) if gate is not None else None
    rows, groups = len(x_rows), channels // size
    height, width, warps = _tile(rows, size, GRADIENT_TILE, 8)
    tiles = triton.cdiv(triton.cdiv(rows, height), max(1, _most_programs(x.device) // groups))
    programs = triton.cdiv(rows, height * tiles)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device) if gate is not None else None
    sums = torch.empty(programs, channels, dtype=torch.float32, device=x.device) if weight is not None else None
    with torch.cuda.device_of(x):
        gated_norm_gradient_kernel[(programs * groups,)](
            x_rows, gates, weight, scales, d_rows, dx, d_gate, sums, rows, tiles, x_rows.stride(0),
            0 if gates is None else gates.stride(0), d_rows.stride(0),
            D=channels, SIZE=size, BR=height, BD=width, HAS_GATE=gates is not None,
            HAS_WEIGHT=weight is not None, GATE_FIRST=gate_first and gates is not None, num_warps=warps,
        )  # fmt: skip
    d_weight = sums.sum(0).to(weight.dtype) if weight is not None and sums is not None else None
    return dx, d_weight, d_gate


def _fake_normalise(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, size: int, gate_first: bool
) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1]
    scales = x.new_empty(x.numel() // channels, channels // size, dtype=torch.float32)
    return x.new_empty(x.shape), scales


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, scales: Tensor, size: int, gate_first: bool
) -> tuple[Tensor, ...]:
    gradients = _gradients(x, weight, gate, scales, d_out, size, gate_first)
    return tuple(absent(x) if gradient is None else gradient for gradient in gradients)


def _fake_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, scales: Tensor, size: int, gate_first: bool
) -> tuple[Tensor, ...]:
    return tuple(absent(x) if y is None else y.new_empty(y.shape) for y in (x, weight, gate))


_INPUTS = "Tensor x, Tensor? weight, Tensor? gate"
_operator = define(
    f"gated_rms_norm({_INPUTS}, float eps, int size, bool gate_first) -> (Tensor, Tensor)", _normalise, _fake_normalise
)
_backward_operator = define(
    f"gated_rms_norm_backward(Tensor d_out, {_INPUTS}, Tensor scales, int size, bool gate_first) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, gate, _, size, gate_first = inputs
    ctx.save_for_backward(x, weight, gate, output[1])
    ctx.size, ctx.gate_first = size, gate_first
    ctx.mark_non_differentiable(output[1])


def _operator_gradients(ctx: Any, d_out: Tensor, of_scales: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: gradient checkpointing hands each tensor out a single time
    _x, weight, gate, _scales = saved
    dx, d_weight, d_gate = _backward_operator(d_out, *saved, ctx.size, ctx.gate_first)
    return dx, None if weight is None else d_weight, None if gate is None else d_gate, None, None, None


torch.library.register_autograd("statex::gated_rms_norm", _operator_gradients, setup_context=_save)
