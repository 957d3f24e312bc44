"""The versions of each operation, PyTorch's and Triton's, and which of them runs."""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from statex.ops.carried import carried_recurrence, carried_short_convolution, carrying
from statex.ops.convolution import shifted_convolution, step_convolution
from statex.ops.gated_delta import chunk_gated_delta, step_gated_delta
from statex.ops.gated_norm import plain_gated_rms_norm
from statex.ops.generalized_delta import chunk_generalized_delta, step_generalized_delta
from statex.ops.gla import chunk_gla, step_gla
from statex.ops.parallel import (
    parallel_delta,
    parallel_gla,
    parallel_selective_scan,
    parallel_short_convolution,
    parallel_ssd,
    slices,
)
from statex.ops.recomputed import (
    gated_delta_operator,
    generalized_delta_operator,
    gla_operator,
    selective_scan_operator,
    ssd_operator,
)
from statex.ops.selective_scan import chunk_selective_scan, step_selective_scan
from statex.ops.ssd import chunk_ssd, step_ssd
from statex.ops.validation import refuse

logger = logging.getLogger("statex.ops")

BACKENDS = ("auto", "torch", "triton")
TORCH: dict[str, Callable] = {
    "gated_delta": chunk_gated_delta,
    "generalized_delta": chunk_generalized_delta,
    "gla": chunk_gla,
    "selective_scan": chunk_selective_scan,
    "ssd": chunk_ssd,
    "gated_delta_step": step_gated_delta,
    "generalized_delta_step": step_generalized_delta,
    "gla_step": step_gla,
    "selective_scan_step": step_selective_scan,
    "ssd_step": step_ssd,
    "short_convolution": shifted_convolution,
    "short_convolution_step": step_convolution,
    "gated_rms_norm": plain_gated_rms_norm,
}
TRITON = {  # module and function, imported when first asked for; PyTorch's runs where there is none
    "gated_delta": ("statex.ops.gated_delta.triton", "triton_gated_delta"),
    "gla": ("statex.ops.gla.triton", "triton_gla"),
    "ssd": ("statex.ops.ssd.triton", "triton_ssd"),
    "gated_delta_step": ("statex.ops.gated_delta.triton", "triton_gated_delta_step"),
    "gla_step": ("statex.ops.gla.triton", "triton_gla_step"),
    "ssd_step": ("statex.ops.ssd.triton", "triton_ssd_step"),
    "short_convolution": ("statex.ops.triton_convolution", "triton_short_convolution"),
    "short_convolution_step": ("statex.ops.triton_convolution", "triton_short_convolution_step"),
    "gated_rms_norm": ("statex.ops.triton_gated_norm", "triton_gated_rms_norm"),
}
# PyTorch versions that torch.compile cannot follow step by step, as operators
COMPILED: dict[str, Callable] = {
    "gated_delta": gated_delta_operator,
    "generalized_delta": generalized_delta_operator,
    "gla": gla_operator,
    "selective_scan": selective_scan_operator,
    "ssd": ssd_operator,
}
# torch.compile makes one kernel of the PyTorch version of these, together with what stands around them ...
FUSED_BY_COMPILER = {"short_convolution", "short_convolution_step", "gated_rms_norm"}
# ... but of their gradients several: there our kernels are taken
FUSED_WITHOUT_GRADIENTS = {"short_convolution", "gated_rms_norm"}
# What runs instead, on a rank's slice, inside `sequence_parallel`
SLICED: dict[str, Callable] = {
    "gated_delta": parallel_delta,
    "generalized_delta": parallel_delta,
    "gla": parallel_gla,
    "selective_scan": parallel_selective_scan,
    "ssd": parallel_ssd,
    "short_convolution": parallel_short_convolution,
}
# ... and on a segment, inside `carried_state`
SEGMENTED: dict[str, Callable] = {
    "gated_delta": carried_recurrence,
    "generalized_delta": carried_recurrence,
    "gla": carried_recurrence,
    "selective_scan": carried_recurrence,
    "ssd": carried_recurrence,
    "short_convolution": carried_short_convolution,
}
EACH_TOKEN_ALONE = {"gated_rms_norm"}  # runs on a part of a sequence as on the whole

_triton_functions: dict[str, Callable] = {}  # those of TRITON that have been imported
_default = "auto"  # what `use_backend` says


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """What `backend="auto"` means inside this context: "torch", "triton", or "auto" for the choice by device.

    It applies to all threads of the process: gradient checkpointing recomputes in one of autograd's own threads.

    Raises:
        ValueError: the name is unknown.
    """
    global _default
    before, _default = _default, _known(name)
    try:
        yield
    finally:
        _default = before


def choose(op: str, backend: str, like: Tensor) -> Callable:
    """The function that runs `op` on tensors such as `like`."""
    name = _choose_backend(op, backend, like.device, like.dtype)
    around = [
        (context, parts, here)
        for context, parts, here in (("sequence_parallel", SLICED, slices()), ("carried_state", SEGMENTED, carrying()))
        if here is not None
    ]
    if torch.compiler.is_compiling():
        for context, _, _ in around:
            refuse(f"torch.compile cannot follow operations inside {context}; run them without it")
        return _choose_compiled(op, name)
    run = _triton_functions[op] if name == "triton" else TORCH[op]
    for context, parts, here in around if op not in EACH_TOKEN_ALONE else ():
        if op not in parts:
            refuse(f"{op} cannot run on a part of a sequence: {context} has {', '.join(parts)}")
        run = functools.partial(parts[op], run, here)
    return run


def _choose_compiled(op: str, name: str) -> Callable:
    """What torch.compile takes into its graph: an operator, or PyTorch code to fuse."""
    fused = op in FUSED_BY_COMPILER and not (op in FUSED_WITHOUT_GRADIENTS and torch.is_grad_enabled())
    if name == "triton" and not fused:
        return _triton_functions[op]
    return COMPILED.get(op, TORCH[op])


@torch.compiler.assume_constant_result  # what torch.compile traces keeps the choice of the time it was traced
def _choose_backend(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch" or "triton"; then the function is in `_triton_functions`."""
    name = _known(backend)
    if name == "auto":
        name = _default
    if name == "auto":
        # The kernels have no fp64: there the result is wanted exact rather than fast.
        fast = device.type == "cuda" and dtype != torch.float64 and _import_triton(op) is None
        name = "triton" if fast else "torch"
    elif name == "triton":
        _require_triton(op, device)
    if name == "triton":  # all at once: torch.compile sees `_triton_functions` as it was when it first looked
        for each in TRITON:
            _import_triton(each)
    _log_once(op, name)
    return name


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return name


def _require_triton(op: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got a tensor on {device}; "
            "move the tensors to a GPU or use backend='torch'"
        )
    error = _import_triton(op)
    if error is not None:
        raise ValueError(
            f"backend='triton' is not available for {op}: {error}; install statex[triton] or use backend='torch'"
        ) from error


@functools.cache
def _import_triton(op: str) -> Exception | None:
    """Put the Triton version of `op` into `_triton_functions`, or return the reason why there is none."""
    if op not in TRITON:
        return LookupError("it has no Triton version")
    module, function = TRITON[op]
    try:
        _triton_functions[op] = getattr(importlib.import_module(module), function)
    except ImportError as error:
        return error
    return None


@functools.cache
def _log_once(op: str, backend: str) -> None:
    logger.info("%s runs on the %s backend", op, backend)
