"""Shape checks of the public recurrences: each failure names the argument, what it is and what it should be.

Shape letters: B batch, T time, H heads, K key dim, V value dim (gla); P head dim, N state size, G groups (ssd).
"""

import torch
from torch import Tensor


def check_gla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    _check_rank("q", q, "[B, T, H, K]")
    _check_rank("v", v, "[B, T, H, V]")
    batch, num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    _check_shape("k", k, tuple(q.shape))
    _check_shape("log_decay", log_decay, tuple(q.shape))
    _check_shape("v", v, (batch, num_tokens, num_heads, value_dim))
    num_states = _check_segments(cu_seqlens, batch, num_tokens)
    _check_shape("initial_state", initial_state, (num_states, num_heads, key_dim, value_dim))


def check_gla_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> None:
    _check_rank("q", q, "[B, H, K]")
    _check_rank("v", v, "[B, H, V]")
    batch, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    _check_shape("k", k, tuple(q.shape))
    _check_shape("log_decay", log_decay, tuple(q.shape))
    _check_shape("v", v, (batch, num_heads, value_dim))
    _check_shape("state", state, (batch, num_heads, key_dim, value_dim))


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_rank("x", x, "[B, T, H, P]")
    _check_rank("B", B, "[B, T, G, N]")
    batch, num_tokens, num_heads, head_dim = x.shape
    num_groups, state_size = B.shape[2:]
    _check_groups(num_heads, num_groups)
    _check_shape("dt", dt, (batch, num_tokens, num_heads))
    _check_shape("A", A, (num_heads,))
    _check_shape("B", B, (batch, num_tokens, num_groups, state_size))
    _check_shape("C", C, tuple(B.shape))
    _check_shape("D", D, (num_heads,))
    num_states = _check_segments(cu_seqlens, batch, num_tokens)
    _check_shape("initial_state", initial_state, (num_states, num_heads, head_dim, state_size))


def check_ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None) -> None:
    _check_rank("x", x, "[B, H, P]")
    _check_rank("B", B, "[B, G, N]")
    batch, num_heads, head_dim = x.shape
    num_groups, state_size = B.shape[1:]
    _check_groups(num_heads, num_groups)
    _check_shape("dt", dt, (batch, num_heads))
    _check_shape("A", A, (num_heads,))
    _check_shape("B", B, (batch, num_groups, state_size))
    _check_shape("C", C, tuple(B.shape))
    _check_shape("D", D, (num_heads,))
    _check_shape("state", state, (batch, num_heads, head_dim, state_size))


def _check_rank(name: str, tensor: Tensor, letters: str) -> None:
    if tensor.ndim != letters.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {letters}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {letters} without an empty dimension")


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def _check_groups(num_heads: int, num_groups: int) -> None:
    if num_heads % num_groups:
        raise ValueError(f"B has {num_groups} groups, expected a divisor of the {num_heads} heads of x")


def _check_segments(cu_seqlens: Tensor | None, batch: int, num_tokens: int) -> int:
    """The number of states: one a row, or one a segment. The borders are read only where that needs no GPU sync."""
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"cu_seqlens packs segments in one row, but the batch is {batch}, expected 1: flatten it")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens is {got}, expected int32 or int64 of shape [S + 1], S >= 1")
    if cu_seqlens.device.type == "cpu":
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != num_tokens or borders != sorted(borders):
            raise ValueError(f"cu_seqlens is {borders}, expected borders rising from 0 to T = {num_tokens}")
    return len(cu_seqlens) - 1
