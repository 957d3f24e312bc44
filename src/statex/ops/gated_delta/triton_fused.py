"""The gated delta rule with a decay a head on the GPU: forward and backward on kernels that fuse what a chunk needs.

Shape letters: B batch, T time, H heads, K key dim, V value dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.gated_delta import fused_launch as launch
from statex.ops.operators import absent, define, num_states
from statex.ops.triton_layout import aligned, most_chunks


def fits(v: Tensor, log_decay: Tensor, key_dim: int) -> bool:
    """Whether it is such a call as was tried on a GPU: in bf16, with a decay a head, and few enough channels."""
    few = key_dim <= launch.MOST_KEYS and v.shape[-1] <= launch.MOST_VALUES
    return few and v.dtype == torch.bfloat16 and log_decay.ndim == 3


def fused_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`triton_gated_delta` where it `fits`."""
    dtype = v.dtype
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    q, k, v, log_decay, beta = (x.contiguous() for x in (q.to(work), k.to(work), v.to(work), log_decay, beta))
    initial = None if initial_state is None else initial_state.float().contiguous()
    if torch.compiler.is_compiling():
        output, final, *_ = _operator(q, k, v, log_decay, beta, initial, cu_seqlens, scale, output_final_state)
    else:
        layout = launch.layout_of(q, cu_seqlens)
        with torch.cuda.device_of(q):
            q, k, v = aligned(q), aligned(k), aligned(v)
            output, final = _GatedDelta.apply(q, k, v, log_decay, beta, initial, scale, output_final_state, layout)
    return output.to(dtype), final if output_final_state else None


class _GatedDelta(torch.autograd.Function):
    """Forward and backward over the kernels where nothing is compiled; q, k, v, log_decay, beta are [B, T, H, ...],
    contiguous."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, initial, scale, output_final_state, layout):
        kept = launch.room_for(q, v, layout.num_chunks)
        final = launch.state_like(q, v, layout.num_segments) if output_final_state else None
        output = launch.forward(q, k, v, log_decay, beta, initial, scale, final, kept, layout)
        ctx.save_for_backward(q, k, v, log_decay, beta, initial, *kept)
        ctx.scale, ctx.layout = scale, layout
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_final):
        q, k, v, log_decay, beta, initial, *kept = ctx.saved_tensors
        d_initial = torch.empty_like(initial) if initial is not None and ctx.needs_input_grad[5] else None
        gradients = launch.backward(
            d_output, d_final, q, k, v, log_decay, beta, d_initial, ctx.scale, launch.Kept(*kept), ctx.layout
        )
        return *gradients, d_initial, None, None, None


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, ...]:
    """Output, final state and what is kept. With `cu_seqlens` there is room for the most chunks that this many
    segments can have: the actual number depends on the borders, which compiled code has not read."""
    layout = launch.layout_of(q, cu_seqlens)
    with torch.cuda.device_of(q):
        kept = launch.room_for(q, v, most_chunks(q.shape[0], q.shape[1], cu_seqlens, launch.CHUNK))
        final = launch.state_like(q, v, layout.num_segments) if output_final_state else None
        q, k, v = aligned(q), aligned(k), aligned(v)
        output = launch.forward(q, k, v, log_decay, beta, initial, scale, final, kept, layout)
    return output, absent(v) if final is None else final, *kept


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, ...]:
    kept = launch.room_for(q, v, most_chunks(q.shape[0], q.shape[1], cu_seqlens, launch.CHUNK))
    final = launch.state_like(q, v, num_states(q, cu_seqlens)) if output_final_state else absent(v)
    return torch.empty_like(v), final, *kept


def _backward_kernel(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay, beta and the initial state."""
    layout = launch.layout_of(q, cu_seqlens)
    d_initial = torch.empty_like(initial) if initial is not None else None
    with torch.cuda.device_of(q):
        q, k, v = aligned(q), aligned(k), aligned(v)
        gradients = launch.backward(
            d_output, d_final, q, k, v, log_decay, beta, d_initial, scale, launch.Kept(*kept), layout
        )  # fmt: skip
    return *gradients, absent(v) if d_initial is None else d_initial


def _fake_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    gradients = map(torch.empty_like, (q, k, v, log_decay, beta))
    return *gradients, absent(v) if initial is None else torch.empty_like(initial)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor? initial, Tensor? cu_seqlens"
_KEPT = ", ".join(f"Tensor {name}" for name in launch.Kept._fields)
_operator = define(
    f"gated_delta({_INPUTS}, float scale, bool output_final_state) -> (Tensor output, Tensor final, {_KEPT})",
    _forward_kernel,
    _fake_forward,
)
_backward_operator = define(
    f"gated_delta_backward(Tensor d_output, Tensor? d_final, {_INPUTS}, float scale, {_KEPT}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale = scale
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *of_kept: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, initial, cu_seqlens, *kept = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    *gradients, d_initial = _backward_operator(
        d_output, d_final, q, k, v, log_decay, beta, initial, cu_seqlens, ctx.scale, *kept
    )
    return *gradients, None if initial is None else d_initial, None, None, None


torch.library.register_autograd("statex::gated_delta", _gradients, setup_context=_save)
