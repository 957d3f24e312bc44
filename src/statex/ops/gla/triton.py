"""Gated linear attention on the GPU: forward and backward on Triton kernels, and the one-token step.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.gla import triton_launch as launch
from statex.ops.gla.triton_step import triton_gla_step
from statex.ops.operators import absent, define, needs_gradients, num_states
from statex.ops.triton_layout import aligned, most_chunks

__all__ = ["triton_gla", "triton_gla_step"]


def triton_gla(
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
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t  (arXiv 2312.06635, equation 3).

    Arguments and results are those of `chunk_gla`, on CUDA. bf16 inputs use bf16 products with fp32 sums and keep
    a bf16 copy of the state for each chunk; the state itself is carried, given and returned in fp32. fp16 and fp32
    inputs are computed in fp32.
    """
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    q, k, v, log_decay = (x.contiguous() for x in (q.to(work), k.to(work), v.to(work), log_decay))
    initial = None if initial_state is None else initial_state.float().contiguous()
    if torch.compiler.is_compiling():
        for_backward = needs_gradients(q, k, v, log_decay, initial)
        output, final, *_ = _operator(
            q, k, v, log_decay, initial, cu_seqlens, scale, output_final_state, for_backward
        )  # fmt: skip
    else:
        layout = launch.layout_of(q, v, cu_seqlens)
        with torch.cuda.device_of(q):
            q, k, v = aligned(q), aligned(k), aligned(v)
            output, final = _Gla.apply(q, k, v, log_decay, initial, scale, output_final_state, layout)
    return output.to(dtype), final if output_final_state else None


class _Gla(torch.autograd.Function):
    """Forward and backward over the kernels where nothing is compiled; q, k, v, log_decay are [B, T, H, ...],
    contiguous."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial, scale, output_final_state, layout):
        with_rest = q.dtype == torch.bfloat16 and any(ctx.needs_input_grad)
        states, prepared = launch.filled(launch.room_for(q, v, layout.chunk, layout.num_chunks, with_rest), layout)
        final = launch.state_like(v, k, layout.num_segments) if output_final_state else None
        output = launch.forward(q, k, v, log_decay, initial, scale, final, states, prepared, layout)
        ctx.save_for_backward(q, k, v, log_decay, initial, states, *prepared)
        ctx.scale, ctx.layout = scale, layout
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_final):
        q, k, v, log_decay, initial, states, *prepared = ctx.saved_tensors
        d_initial = torch.empty_like(initial) if initial is not None and ctx.needs_input_grad[4] else None
        gradients = launch.backward(
            d_output, d_final, q, k, v, log_decay, d_initial, ctx.scale, states, launch.Prepared(*prepared), ctx.layout
        )
        return *gradients, d_initial, None, None, None


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    for_backward: bool,
) -> tuple[Tensor, ...]:
    """Output, final state and what is kept. With `cu_seqlens` there is room for the most chunks that this many
    segments can have: the actual number depends on the borders, which compiled code has not read."""
    layout, with_rest = launch.layout_of(q, v, cu_seqlens), for_backward and q.dtype == torch.bfloat16
    with torch.cuda.device_of(q):
        room = most_chunks(q.shape[0], q.shape[1], cu_seqlens, layout.chunk)
        kept = launch.room_for(q, v, layout.chunk, room, with_rest)
        final = launch.state_like(v, k, layout.num_segments) if output_final_state else None
        states, prepared = launch.filled(kept, layout)
        q, k, v = aligned(q), aligned(k), aligned(v)
        output = launch.forward(q, k, v, log_decay, initial, scale, final, states, prepared, layout)
    return output, absent(v) if final is None else final, *kept


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    for_backward: bool,
) -> tuple[Tensor, ...]:
    chunk = launch.chunk_size(q.shape[-1], v.shape[-1], q.shape[1])
    room = most_chunks(q.shape[0], q.shape[1], cu_seqlens, chunk)
    kept = launch.room_for(q, v, chunk, room, for_backward and q.dtype == torch.bfloat16)
    final = launch.state_like(v, k, num_states(q, cu_seqlens)) if output_final_state else absent(v)
    return torch.empty_like(v), final, *kept


def _backward_kernel(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay and the initial state."""
    layout = launch.layout_of(q, v, cu_seqlens)
    d_initial = torch.empty_like(initial) if initial is not None else None
    with torch.cuda.device_of(q):
        states, prepared = launch.filled(launch.Kept(*kept), layout)
        q, k, v = aligned(q), aligned(k), aligned(v)
        gradients = launch.backward(
            d_output, d_final, q, k, v, log_decay, d_initial, scale, states, prepared, layout
        )  # fmt: skip
    return *gradients, absent(v) if d_initial is None else d_initial


def _fake_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    return *map(torch.empty_like, (q, k, v, log_decay)), absent(v) if initial is None else torch.empty_like(initial)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial, Tensor? cu_seqlens, float scale"
_KEPT = ", ".join(f"Tensor {name}" for name in launch.Kept._fields)
_operator = define(
    f"gla({_INPUTS}, bool output_final_state, bool for_backward) -> (Tensor output, Tensor final, {_KEPT})",
    _forward_kernel,
    _fake_forward,
)
_backward_operator = define(
    f"gla_backward(Tensor d_output, Tensor? d_final, {_INPUTS}, {_KEPT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, scale, _, for_backward = inputs
    if not for_backward:
        raise ValueError("for_backward is False, expected True where an input of statex::gla requires gradients")
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale = scale
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *of_kept: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial, cu_seqlens, *kept = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    *gradients, d_initial = _backward_operator(
        d_output, d_final, q, k, v, log_decay, initial, cu_seqlens, ctx.scale, *kept
    )
    return *gradients, None if initial is None else d_initial, None, None, None, None


torch.library.register_autograd("statex::gla", _gradients, setup_context=_save)
