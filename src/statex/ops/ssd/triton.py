"""State space duality (Mamba2) on the GPU: forward and backward on Triton kernels, and the one-token step.

Shape letters: B batch, T time, H heads, G groups, P head dim, N state size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.operators import absent, define, num_states
from statex.ops.ssd import triton_launch as launch
from statex.ops.ssd.triton_step import triton_ssd_step
from statex.ops.triton_layout import aligned, most_chunks

__all__ = ["triton_ssd", "triton_ssd_step"]


def triton_ssd(
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

    Arguments and results are those of `chunk_ssd`, on CUDA. A bf16 x means bf16 products with fp32 sums and a bf16
    copy of the state for each chunk; the state itself is carried, given and returned in fp32. Other inputs are
    computed in fp32.
    """
    dtype = x.dtype
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    x, B, C, dt = (tensor.contiguous() for tensor in (x.to(work), B.to(work), C.to(work), dt))
    A, D = A.float().contiguous(), None if D is None else D.float().contiguous()
    initial = None if initial_state is None else initial_state.float().contiguous()
    if torch.compiler.is_compiling():
        output, final, *_ = _operator(x, dt, A, B, C, D, initial, cu_seqlens, output_final_state)
    else:
        x, B, C, layout = aligned(x), aligned(B), aligned(C), launch.layout_of(x, B, cu_seqlens)
        with torch.cuda.device_of(x):
            output, final = _Ssd.apply(x, dt, A, B, C, D, initial, output_final_state, layout)
    return output.to(dtype), final if output_final_state else None


class _Ssd(torch.autograd.Function):
    """Forward and backward over the kernels where nothing is compiled; all tensors contiguous."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial, output_final_state, layout):
        states, scores, tables = launch.filled(launch.room_for(x, B, layout.chunk, layout.num_chunks), layout)
        call = launch.Call(x, B, C, D, tables, layout)
        final = launch.state_like(x, B, layout.num_segments) if output_final_state else None
        output = launch.forward(call, dt, A, initial, final, states, scores)
        ctx.save_for_backward(x, dt, A, B, C, D, initial, states, *scores, *tables)
        ctx.layout = layout
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_final):
        x, dt, A, B, C, D, initial, states, *rest = ctx.saved_tensors
        scores, tables = launch.Scores(*rest[:2]), launch.Tables(*rest[2:])
        d_initial = torch.empty_like(initial) if initial is not None and ctx.needs_input_grad[6] else None
        call = launch.Call(x, B, C, D, tables, ctx.layout)
        return *launch.backward(call, d_output, d_final, dt, A, d_initial, states, scores), d_initial, None, None


def _forward_kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, ...]:
    """Output, final state and what is kept. With `cu_seqlens` there is room for the most chunks that this many
    segments can have: the actual number depends on the borders, which compiled code has not read."""
    layout = launch.layout_of(x, B, cu_seqlens)
    with torch.cuda.device_of(x):
        kept = launch.room_for(x, B, layout.chunk, most_chunks(x.shape[0], x.shape[1], cu_seqlens, layout.chunk))
        states, scores, tables = launch.filled(kept, layout)
        call = launch.Call(aligned(x), aligned(B), aligned(C), D, tables, layout)
        final = launch.state_like(x, B, layout.num_segments) if output_final_state else None
        output = launch.forward(call, dt, A, initial, final, states, scores)
    return output, absent(x) if final is None else final, *kept


def _fake_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, ...]:
    chunk = launch.chunk_size(B.shape[-1], x.shape[1])
    kept = launch.room_for(x, B, chunk, most_chunks(x.shape[0], x.shape[1], cu_seqlens, chunk))
    final = launch.state_like(x, B, num_states(x, cu_seqlens)) if output_final_state else absent(x)
    return torch.empty_like(x), final, *kept


def _backward_kernel(
    d_output: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the initial state."""
    layout = launch.layout_of(x, B, cu_seqlens)
    d_initial = None if initial is None else torch.empty_like(initial)
    with torch.cuda.device_of(x):
        states, scores, tables = launch.filled(launch.Kept(*kept), layout)
        call = launch.Call(aligned(x), aligned(B), aligned(C), D, tables, layout)
        gradients = *launch.backward(call, d_output, d_final, dt, A, d_initial, states, scores), d_initial
    return tuple(absent(x) if gradient is None else gradient for gradient in gradients)


def _fake_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(absent(x) if y is None else torch.empty_like(y) for y in (x, dt, A, B, C, D, initial))


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial, Tensor? cu_seqlens"
_KEPT = ", ".join(f"Tensor {name}" for name in launch.Kept._fields)
_operator = define(
    f"ssd({_INPUTS}, bool output_final_state) -> (Tensor output, Tensor final, {_KEPT})", _forward_kernel, _fake_forward
)
_backward_operator = define(
    f"ssd_backward(Tensor d_output, Tensor? d_final, {_INPUTS}, {_KEPT}) -> ({', '.join(['Tensor'] * 7)})",
    _backward_kernel,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *of_kept: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, _, _, _, _, D, initial, _ = saved[:8]
    if d_output is None:
        d_output = torch.zeros_like(x)
    *gradients, d_D, d_initial = _backward_operator(d_output, d_final, *saved)
    return *gradients, None if D is None else d_D, None if initial is None else d_initial, None, None


torch.library.register_autograd("statex::ssd", _gradients, setup_context=_save)
