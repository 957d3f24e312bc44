"""Shape checks of the public operations: each failure names the argument, what it is and what it should be.

Shape letters: B batch, T time, H heads, K key dim, V value dim (gla, gated_delta, generalized_delta); P head dim,
N state size, G groups (ssd); D channels (selective_scan, short_convolution), W taps, L tokens of context
(short_convolution).
"""

from typing import NoReturn

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # called, not traced: so the message arrives whole
def refuse(message: str) -> NoReturn:
    raise ValueError(message)


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
    num_states = check_segments(cu_seqlens, batch, num_tokens)
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


def check_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_rank("q", q, "[B, T, H, K]")
    _check_rank("v", v, "[B, T, H, V]")
    batch, num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    _check_shape("k", k, tuple(q.shape))
    _check_shape("v", v, (batch, num_tokens, num_heads, value_dim))
    _check_decay(log_decay, tuple(q.shape))
    _check_shape("beta", beta, (batch, num_tokens, num_heads))
    num_states = check_segments(cu_seqlens, batch, num_tokens)
    _check_shape("initial_state", initial_state, (num_states, num_heads, key_dim, value_dim))


def check_gated_delta_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> None:
    _check_rank("q", q, "[B, H, K]")
    _check_rank("v", v, "[B, H, V]")
    batch, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    _check_shape("k", k, tuple(q.shape))
    _check_shape("v", v, (batch, num_heads, value_dim))
    _check_decay(log_decay, tuple(q.shape))
    _check_shape("beta", beta, (batch, num_heads))
    _check_shape("state", state, (batch, num_heads, key_dim, value_dim))


def check_generalized_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_gla(q, k, v, log_decay, initial_state, cu_seqlens)
    for name, tensor in (("a", a), ("b", b)):
        _check_shape(name, tensor, tuple(q.shape))


def check_generalized_delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> None:
    check_gla_step(q, k, v, log_decay, state)
    for name, tensor in (("a", a), ("b", b)):
        _check_shape(name, tensor, tuple(q.shape))


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
    num_states = check_segments(cu_seqlens, batch, num_tokens)
    _check_shape("initial_state", initial_state, (num_states, num_heads, head_dim, state_size))


def check_ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
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
    _check_shape("dt_bias", dt_bias, (num_heads,))
    _check_shape("state", state, (batch, num_heads, head_dim, state_size))


def check_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_rank("x", x, "[B, T, D]")
    _check_rank("A", A, "[D, N]")
    batch, num_tokens, num_channels = x.shape
    state_size = A.shape[1]
    _check_shape("dt", dt, tuple(x.shape))
    _check_shape("A", A, (num_channels, state_size))
    _check_shape("B", B, (batch, num_tokens, state_size))
    _check_shape("C", C, (batch, num_tokens, state_size))
    _check_shape("D", D, (num_channels,))
    num_states = check_segments(cu_seqlens, batch, num_tokens)
    _check_shape("initial_state", initial_state, (num_states, num_channels, state_size))


def check_selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None
) -> None:
    _check_rank("x", x, "[B, D]")
    _check_rank("A", A, "[D, N]")
    batch, num_channels = x.shape
    state_size = A.shape[1]
    _check_shape("dt", dt, tuple(x.shape))
    _check_shape("A", A, (num_channels, state_size))
    _check_shape("B", B, (batch, state_size))
    _check_shape("C", C, (batch, state_size))
    _check_shape("D", D, (num_channels,))
    _check_shape("state", state, (batch, num_channels, state_size))


def check_short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, left_context: Tensor | None, seq_idx: Tensor | None
) -> None:
    _check_rank("x", x, "[B, T, D]")
    _check_rank("weight", weight, "[D, W]")
    batch, num_tokens, num_channels = x.shape
    _check_shape("weight", weight, (num_channels, weight.shape[1]))
    _check_shape("bias", bias, (num_channels,))
    if left_context is not None:
        _check_rank("left_context", left_context, "[B, L, D]")
        _check_shape("left_context", left_context, (batch, left_context.shape[1], num_channels))
    _check_shape("seq_idx", seq_idx, (batch, num_tokens))


def check_short_convolution_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_rank("x", x, "[B, D]")
    _check_rank("weight", weight, "[D, W]")
    batch, num_channels = x.shape
    _check_shape("weight", weight, (num_channels, weight.shape[1]))
    _check_shape("state", state, (batch, num_channels, weight.shape[1]))
    _check_shape("bias", bias, (num_channels,))


def check_gated_rms_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, group_size: int | None) -> None:
    if x.ndim == 0 or 0 in x.shape:
        refuse(f"x has shape {tuple(x.shape)}, expected [..., D] without an empty dimension")
    _check_shape("weight", weight, (x.shape[-1],))
    _check_shape("gate", gate, tuple(x.shape))
    if group_size is not None and x.shape[-1] % group_size:
        refuse(f"group_size is {group_size}, expected a divisor of the {x.shape[-1]} channels of x")


def _check_rank(name: str, tensor: Tensor, letters: str) -> None:
    if tensor.ndim != letters.count(",") + 1:
        refuse(f"{name} has shape {tuple(tensor.shape)}, expected {letters}")
    if 0 in tensor.shape:
        refuse(f"{name} has shape {tuple(tensor.shape)}, expected {letters} without an empty dimension")


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        refuse(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def _check_decay(log_decay: Tensor, keys: tuple[int, ...]) -> None:
    if tuple(log_decay.shape) not in (keys, keys[:-1]):
        refuse(f"log_decay has shape {tuple(log_decay.shape)}, expected {keys[:-1]} or {keys}")


def _check_groups(num_heads: int, num_groups: int) -> None:
    if num_heads % num_groups:
        refuse(f"B has {num_groups} groups, expected a divisor of the {num_heads} heads of x")


def check_segments(cu_seqlens: Tensor | None, batch: int, num_tokens: int) -> int:
    """The number of states: one per row, or one per segment. The borders are read only where that needs no GPU sync,
    and not while torch.compile traces: what runs then reads them."""
    if cu_seqlens is None:
        return batch
    if batch != 1:
        refuse(f"cu_seqlens packs segments in one row, but the batch is {batch}, expected 1: flatten it")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        refuse(f"cu_seqlens is {got}, expected int32 or int64 of shape [S + 1], S >= 1")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_borders(cu_seqlens.tolist(), num_tokens)
    return cu_seqlens.shape[0] - 1


def check_borders(borders: list[int], num_tokens: int) -> None:
    """cu_seqlens, read: the borders of the segments of one row."""
    if borders[0] != 0 or borders[-1] != num_tokens or borders != sorted(borders):
        refuse(f"cu_seqlens is {borders}, expected borders rising from 0 to T = {num_tokens}")
