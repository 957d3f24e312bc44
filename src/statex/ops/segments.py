"""What all recurrences share: the precision of the arithmetic, and sequences of several segments (cu_seqlens).

Shape letters: B batch, T time, S number of segments.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from statex.ops.validation import check_borders, check_segments


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others: the dtype of the arithmetic and of the states."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(recurrence: Callable) -> Callable:
    """Keep autocast out of a recurrence: it would run the products in half precision."""

    @functools.wraps(recurrence)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return recurrence(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return recurrence(*args, **kwargs)

    return wrapped


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def over_segments(
    recurrence: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Apply `recurrence` to each segment of one packed sequence.

    Args:
        recurrence: called as `recurrence(*inputs, initial_state=..., output_final_state=...)`; a token whose
            inputs are all zero must leave its state as it is.
        inputs: tensors of shape [1, T, ...].
        cu_seqlens: [S + 1] borders, from 0 to T; segment s is cu_seqlens[s] : cu_seqlens[s + 1], possibly empty.
        initial_state: [S, ...] or None for zeros.

    Returns:
        output [1, T, ...] and final states [S, ...] or None.

    Segments whose lengths have the same power of two run as one batch, padded with zeros to the longest, so that
    there are at most log2(T) calls and less than half of the work is padding.
    """
    borders = cu_seqlens.tolist()
    num_tokens, device = inputs[0].shape[1], inputs[0].device
    check_borders(borders, num_tokens)
    padded = [F.pad(x[0], [0, 0] * (x.ndim - 2) + [0, 1]) for x in inputs]  # token num_tokens is all zeros
    outputs, tokens, states, order = [], [], [], []
    for members in _buckets(borders):
        starts = torch.tensor([borders[s] for s in members], device=device)
        lengths = torch.tensor([borders[s + 1] - borders[s] for s in members], device=device)
        position = torch.arange(max(1, int(lengths.max())), device=device)  # an empty segment is one of padding
        valid = position < lengths[:, None]
        index = torch.where(valid, starts[:, None] + position, num_tokens)
        output, state = recurrence(
            *(x[index] for x in padded),
            initial_state=None if initial_state is None else initial_state[members],
            output_final_state=output_final_state,
        )
        outputs.append(output[valid])
        tokens.append(index[valid])
        order += members
        if state is not None:
            states.append(state)
    output = torch.cat(outputs)[torch.cat(tokens).argsort()][None]
    if not states:
        return output, None
    return output, torch.cat(states)[torch.tensor(order, device=device).argsort()]


def _buckets(borders: list[int]) -> list[list[int]]:
    """Segment indices grouped by the power of two of their length; an empty segment counts as one of length 1."""
    buckets = defaultdict(list)
    for s, (start, end) in enumerate(pairwise(borders)):
        buckets[max(end - start, 1).bit_length()].append(s)
    return list(buckets.values())


def cu_seqlens_of(seq_idx: Tensor) -> Tensor:
    """Borders of the documents of packed rows, laid end to end.

    Args:
        seq_idx: [B, T] int, which document of its row each token belongs to.

    Returns:
        cu_seqlens [S + 1] over the B * T tokens, on the CPU, where they are read: once per pass of a model, not once
        per layer. A row's first token always begins a document.
    """
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=seq_idx.numel()).cpu()


def one_seq_idx(seq_idx: Tensor | None, cu_seqlens: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which document each token belongs to, as one of two arguments of a model says; None where neither is given.

    Args:
        seq_idx: [B, T] int.
        cu_seqlens: [S + 1] int, the borders of the S documents of one row; B must be 1.
        tokens: [B, T, ...], of which they are.

    Raises:
        ValueError: both are given, or the borders do not rise from 0 to T.
    """
    if cu_seqlens is None:
        return seq_idx
    if seq_idx is not None:
        raise ValueError("cu_seqlens says the same as seq_idx; give one of them")
    batch, num_tokens = tokens.shape[:2]
    check_segments(cu_seqlens.cpu(), batch, num_tokens)  # where the borders are read
    positions = torch.arange(num_tokens, device=tokens.device)
    ends = cu_seqlens[1:].to(positions)
    return torch.searchsorted(ends, positions, right=True, out_int32=True)[None]
