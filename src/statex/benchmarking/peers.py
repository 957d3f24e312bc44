"""The only door to other libraries' kernels: flash-linear-attention and mamba_ssm, imported when asked for.

Kernels of `fla` are imported nowhere else, but with its models (`models/fla.py`). Of mamba_ssm only the Triton sources
are used: its package imports compiled extensions, so the package itself is not run.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor

from statex.utils.environment import package_version

MAMBA_CHUNK = 256  # tokens; what mamba_ssm's own models use


def peer(op: str, key_dim: int) -> tuple[str, Callable[..., object]] | None:
    """Name and function of the other library's version of `op`, called as ours; None where it is not installed, or has
    no such key dimension."""
    if op not in PEERS or key_dim > MOST_KEYS.get(op, key_dim):
        return None
    try:
        return PEERS[op]()
    except ImportError:
        return None


def _fla_gla() -> tuple[str, Callable[..., object]]:
    chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options):
        return chunk_gla(q, k, v, log_decay, **options)

    return f"fla {package_version('fla-core')}", run


def _fla_gla_step() -> tuple[str, Callable[..., object]]:
    recurrent = importlib.import_module("fla.ops.gla").fused_recurrent_gla

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        step = (x.unsqueeze(1) for x in (q, k, v, log_decay))
        output, new_state = recurrent(*step, initial_state=state, output_final_state=True)
        return output[:, 0], new_state  # it cannot work in place, and a copy would be timed against it

    return f"fla {package_version('fla-core')}", run


def _fla_gated_delta() -> tuple[str, Callable[..., object]]:
    chunk = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **options):
        return chunk(q, k, v, log_decay, beta.to(v.dtype), **options)

    return f"fla {package_version('fla-core')}", run


def _mamba_ssd() -> tuple[str, Callable[..., object]]:
    _without_extensions("mamba_ssm")
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(x, dt, A, B, C, D=None, initial_state=None, output_final_state=False):
        options = {"D": D, "initial_states": initial_state, "return_final_states": output_final_state}
        output = scan(x, dt, A, B, C, MAMBA_CHUNK, **options)
        return output if output_final_state else (output, None)

    return f"mamba_ssm {package_version('mamba-ssm')}", run


def _mamba_ssd_step() -> tuple[str, Callable[..., object]]:
    _without_extensions("mamba_ssm")
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def run(x, dt, A, B, C, state, D=None):
        heads, head_dim, state_size = state.shape[1:]
        rate = A[:, None, None].expand(heads, head_dim, state_size)
        skip = None if D is None else D[:, None].expand(heads, head_dim)
        bias = _zeros(heads, x.device)[:, None].expand(heads, head_dim)  # it does not take None here
        return update(state, x, dt[..., None].expand(*dt.shape, head_dim), rate, B, C, D=skip, dt_bias=bias)

    return f"mamba_ssm {package_version('mamba-ssm')}", run


@functools.cache
def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, device=device)


@functools.cache
def _without_extensions(package: str) -> None:
    """Register an empty package of that name and place, so that its submodules import without its __init__."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed")
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = module


PEERS = {
    "gla": _fla_gla, "gla_step": _fla_gla_step, "gated_delta": _fla_gated_delta, "ssd": _mamba_ssd,
    "ssd_step": _mamba_ssd_step,
}  # fmt: skip
MOST_KEYS = {"gated_delta": 256}
"""The largest key dimension that a peer has."""
