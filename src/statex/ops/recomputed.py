"""The chunked recurrences in PyTorch as operators: torch.compile need not unroll their chunks, nor can it follow steps
that depend on data (how strong a decay is, where a segment ends). The backward pass computes the forward again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from statex.ops.gated_delta.chunk import chunk_gated_delta
from statex.ops.generalized_delta.chunk import chunk_generalized_delta
from statex.ops.gla.chunk import chunk_gla
from statex.ops.operators import absent, define, num_states
from statex.ops.segments import compute_dtype
from statex.ops.selective_scan.chunk import chunk_selective_scan
from statex.ops.ssd.chunk import chunk_ssd

AUTOGRAD_KEYS = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


def gla_operator(
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
    """`chunk_gla` in compiled code."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output, state = _GLA(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)
    return output, state if output_final_state else None


def gated_delta_operator(
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
    """`chunk_gated_delta` in compiled code."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output, state = _GATED_DELTA(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, output_final_state)
    return output, state if output_final_state else None


def generalized_delta_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_generalized_delta` in compiled code."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state
    output, state = _GENERALIZED_DELTA(*inputs)
    return output, state if output_final_state else None


def selective_scan_operator(
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
    """`chunk_selective_scan` in compiled code."""
    output, state = _SELECTIVE_SCAN(x, dt, A, B, C, D, initial_state, cu_seqlens, output_final_state)
    return output, state if output_final_state else None


def ssd_operator(
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
    """`chunk_ssd` in compiled code."""
    output, state = _SSD(x, dt, A, B, C, D, initial_state, cu_seqlens, output_final_state)
    return output, state if output_final_state else None


def operator_of(recurrence: Callable, arguments: dict[str, str], fake: Callable) -> Any:
    """The operator `statex::<name of the recurrence>` with its gradients; `arguments` are names and types."""
    name = recurrence.__name__
    differentiable = [key for key, kind in arguments.items() if kind.startswith("Tensor") and key != "cu_seqlens"]
    listed = ", ".join(f"{kind} {key}" for key, kind in arguments.items())

    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        output, state = recurrence(**dict(zip(arguments, given, strict=True)))
        return output.contiguous(), absent(output) if state is None else state.contiguous()

    def gradients(d_output: Tensor | None, d_state: Tensor | None, *given: Any) -> list[Tensor]:
        inputs = dict(zip(arguments, given, strict=True))
        leaves = {key: inputs[key].detach() for key in differentiable if inputs[key] is not None}
        with _recorded():
            for leaf in leaves.values():
                leaf.requires_grad_()
            pairs = zip(recurrence(**inputs | leaves), (d_output, d_state), strict=True)
            results, upstream = zip(*((x, d) for x, d in pairs if d is not None), strict=True)
            found = torch.autograd.grad(results, list(leaves.values()), upstream, materialize_grads=True)
        return [x.clone(memory_format=torch.contiguous_format) for x in found]

    def fake_gradients(d_output: Tensor | None, d_state: Tensor | None, *given: Any) -> list[Tensor]:
        inputs = dict(zip(arguments, given, strict=True))
        return [inputs[key].new_empty(inputs[key].shape) for key in differentiable if inputs[key] is not None]

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, d_output: Tensor | None, d_state: Tensor | None) -> tuple:
        given = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
        found = iter(gradients_operator(d_output, d_state, *given))
        inputs = zip(arguments, given, strict=True)
        return tuple(next(found) if key in differentiable and x is not None else None for key, x in inputs)

    operator = define(f"{name}({listed}) -> (Tensor, Tensor)", forward, fake)
    upstream = "Tensor? d_output, Tensor? d_state"
    gradients_operator = define(f"{name}_backward({upstream}, {listed}) -> Tensor[]", gradients, fake_gradients)
    torch.library.register_autograd(f"statex::{name}", backward, setup_context=setup_context)
    return operator


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd inside of an operator, where the dispatcher has left it behind."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _fake_gla(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state):  # type: ignore[no-untyped-def]
    state = absent(v)
    if output_final_state:
        shape = num_states(v, cu_seqlens), v.shape[2], k.shape[-1], v.shape[-1]
        state = v.new_empty(shape, dtype=compute_dtype(v))
    return v.new_empty(v.shape), state


def fake_gated_delta(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, output_final_state
):
    return _fake_gla(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)


def _fake_generalized_delta(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, output_final_state
):
    return _fake_gla(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)


def _fake_ssd(x, dt, A, B, C, D, initial_state, cu_seqlens, output_final_state):  # type: ignore[no-untyped-def]
    state = absent(x)
    if output_final_state:
        state = x.new_empty((num_states(x, cu_seqlens), *x.shape[2:], B.shape[-1]), dtype=compute_dtype(x))
    return x.new_empty(x.shape), state


_STATES = {"initial_state": "Tensor?", "cu_seqlens": "Tensor?"}
_GLA = operator_of(
    chunk_gla,
    dict.fromkeys(("q", "k", "v", "log_decay"), "Tensor") | _STATES | {"scale": "float", "output_final_state": "bool"},
    _fake_gla,
)
GATED_DELTA_ARGUMENTS = dict.fromkeys(("q", "k", "v", "log_decay", "beta"), "Tensor") | _STATES
GATED_DELTA_ARGUMENTS |= {"scale": "float", "output_final_state": "bool"}
_GATED_DELTA = operator_of(chunk_gated_delta, GATED_DELTA_ARGUMENTS, fake_gated_delta)
_GENERALIZED_DELTA = operator_of(
    chunk_generalized_delta,
    dict.fromkeys(("q", "k", "v", "log_decay", "a", "b"), "Tensor")
    | _STATES
    | {"scale": "float", "output_final_state": "bool"},
    _fake_generalized_delta,
)
_SSD_ARGUMENTS = dict.fromkeys(("x", "dt", "A", "B", "C"), "Tensor") | {"D": "Tensor?"} | _STATES
_SSD_ARGUMENTS |= {"output_final_state": "bool"}
_SSD = operator_of(chunk_ssd, _SSD_ARGUMENTS, _fake_ssd)
_SELECTIVE_SCAN = operator_of(chunk_selective_scan, _SSD_ARGUMENTS, _fake_ssd)
