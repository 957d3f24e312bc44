"""One long sequence over several processes: states travel between them, tokens stay where they are.

All recurrences are linear in their state. A rank's slice, run from a zero state, ends in a state E and keeps a share d
of what it began with (the delta rules: what a matrix d makes of it); then what rank r begins with is S_r = E_{r-1} +
d_{r-1} S_{r-1}. One all-gather of (E, d) gives it to every rank, and what it adds to the outputs is added afterwards.
The traffic does not depend on the length.

Shape letters: B rows, T tokens of a rank's slice of each row, H heads, K key dim, V value dim (gla, delta rules);
P head dim, N state size, G groups (ssd); D channels, N state size (selective_scan); D channels, W taps; S segments;
R ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from statex.ops.segments import compute_dtype, full_precision
from statex.ops.validation import refuse


class Slices(NamedTuple):
    """How sequences lie over the ranks of a group."""

    group: dist.ProcessGroup
    seq_idx: Tensor | None
    """[B, T], which document of its whole row each token of this rank's slice belongs to."""
    continues: Tensor | None
    """[B], whether the document of the first token began on a rank before."""


_slices: Slices | None = None  # of all threads: gradient checkpointing computes again in one of autograd's own


def slices() -> Slices | None:
    """The slices that `sequence_parallel` has set, None outside of it."""
    return _slices


@contextmanager
def sequence_parallel(group: dist.ProcessGroup, seq_idx: Tensor | None = None) -> Iterator[None]:
    """Inside, what the recurrences and `short_convolution` get is this rank's slice of longer sequences.

    Rank 0 of the group has the first tokens, the last rank the last. All ranks must call the same operations in the
    same order, with slices of any length of at least W - 1, and run backward inside as well. A final state is that
    after the slice. An initial state or left context is what stands before the whole sequence: the first rank's alone.

    Args:
        group: the ranks that share a sequence; gloo or NCCL.
        seq_idx: [B, T] int, at least 0: this rank's slice of which document each token belongs to. Needed for
            operations with cu_seqlens, which must then be the borders of these documents, rows laid end to end.

    Raises:
        ValueError: entered inside another.
    """
    global _slices
    if _slices is not None:
        refuse("sequence_parallel is entered inside another; leave that first")
    continues = None
    if seq_idx is not None:
        first, last = seq_idx[:, 0], seq_idx[:, -1]
        before = carried(last, torch.zeros_like(last), group)
        continues = (before == first) & (group.rank() > 0)
    _slices = Slices(group, seq_idx, continues)
    try:
        yield
    finally:
        _slices = None


def carried(end: Tensor, kept: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each rank starts with: 0 on the first, then `end + kept * (what that rank started with)` of the one before.

    Args:
        end: [...], what a rank ends with if it begins with 0.
        kept: as the first dimensions of `end`, the share of its beginning that a rank keeps.

    Returns:
        [...], with gradients to every rank's arguments; all ranks must call it, and its backward.
    """
    return _Carried.apply(end, kept, group, False)


def carried_through(end: Tensor, maps: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`carried`, where a rank makes `maps @ begin` of its beginning: [..., K, K] for an `end` of [..., K, V]."""
    return _Carried.apply(end, maps, group, True)


class _Carried(torch.autograd.Function):
    """Forward and backward are the same scan in opposite directions, each after one all-gather."""

    @staticmethod
    def forward(ctx: Any, end: Tensor, kept: Tensor, group: dist.ProcessGroup, are_maps: bool) -> Tensor:
        sizes = [end.numel(), kept.numel()]
        gathered = _gather(torch.cat([end.flatten(), kept.flatten().to(end.dtype)]), group)
        ends, kepts = gathered.split(sizes, dim=1)
        ends, kepts = ends.view(-1, *end.shape), kepts.view(-1, *kept.shape)
        if not are_maps:
            kepts = _broadcast(kepts, end.ndim + 1)
        begin = torch.zeros_like(end)
        for rank in range(group.rank()):
            begin = ends[rank] + (kepts[rank] @ begin if are_maps else kepts[rank] * begin)
        ctx.group, ctx.kept, ctx.are_maps = group, (kept.shape, kept.dtype), are_maps
        ctx.save_for_backward(kepts, begin)
        return begin

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kepts, begin = ctx.saved_tensors
        shape, dtype = ctx.kept
        of_begin = _gather(gradients[0].flatten(), ctx.group).view(-1, *begin.shape)
        of_end = torch.zeros_like(begin)
        for rank in range(ctx.group.size() - 1, ctx.group.rank(), -1):
            of_end = of_begin[rank] + (kepts[rank].mT @ of_end if ctx.are_maps else kepts[rank] * of_end)
        of_kept = of_end @ begin.mT if ctx.are_maps else (of_end * begin).reshape(*shape, -1).sum(-1)
        return of_end, of_kept.to(dtype), None, None


def _gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] of each rank, as [R, n]."""
    gathered = flat.new_empty(group.size(), flat.numel())
    dist.all_gather(list(gathered.unbind()), flat.contiguous(), group=group)
    return gathered


def _broadcast(x: Tensor, ndim: int) -> Tensor:
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


@full_precision
def parallel_gla(
    run: Callable,
    here: Slices,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`gla` on a slice; `run` is the operation on one rank."""
    _require_first(here, "initial_state", initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output, state = run(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    rows = _rows(here, cu_seqlens, output)
    kept = rows.kept(log_decay.to(compute_dtype(v)))  # [B, T, H, K]
    begin = carried(rows.last(state), kept[:, -1], here.group)  # [B, H, K, V]
    added = torch.einsum("bthk,bhkv->bthv", scale * rows.split(q).to(kept.dtype) * kept, begin)
    output = (output + added.reshape_as(output)).to(output.dtype)
    return output, rows.final(state, kept, begin) if output_final_state else None


@full_precision
def parallel_ssd(
    run: Callable,
    here: Slices,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` on a slice; `run` is the operation on one rank."""
    _require_first(here, "initial_state", initial_state)
    output, state = run(
        x, dt, A, B, C, D=D, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    rows, dtype = _rows(here, cu_seqlens, output), compute_dtype(x)
    kept = rows.kept(dt.to(dtype) * A.to(dtype))  # [B, T, H]
    begin = carried(rows.last(state), kept[:, -1], here.group)  # [B, H, P, N]
    grouped = begin.unflatten(1, (C.shape[2], -1))
    added = torch.einsum("btgn,bgrpn->btgrp", rows.split(C).to(dtype), grouped).flatten(2, 3) * kept[..., None]
    output = (output + added.reshape_as(output)).to(output.dtype)
    return output, rows.final(state, kept, begin) if output_final_state else None


@full_precision
def parallel_delta(
    run: Callable,
    here: Slices,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta` or `generalized_delta` on a slice; `run` is the operation on one rank.

    Each token multiplies the state by a matrix. Run with the identity for a state and with no values, the operation
    itself gives their product, and what each token reads of what the slice begins with.
    """
    _require_first(here, "initial_state", initial_state)
    run = partial(run, scale=scale, output_final_state=True, cu_seqlens=cu_seqlens)
    output, state = run(q, k, v, *rest, initial_state=initial_state)
    rows, key_dim = _rows(here, cu_seqlens, output), k.shape[-1]
    identity = torch.eye(key_dim, dtype=state.dtype, device=state.device)
    identity = rows.initial(identity.expand(rows.shape[0], state.shape[1], key_dim, key_dim).contiguous())
    read, product = run(q, k, v.new_zeros(*v.shape[:-1], key_dim), *rest, initial_state=identity)
    begin = carried_through(rows.last(state), rows.last(product), here.group)  # [B, H, K, V]
    added = torch.einsum("bthk,bhkv->bthv", rows.split(read).to(begin.dtype), begin)
    output = (output + added.reshape_as(output)).to(output.dtype)
    return output, rows.added_to_first(state, rows.first(product) @ begin) if output_final_state else None


def parallel_selective_scan(
    run: Callable,
    here: Slices,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`selective_scan` on a slice; `run` is the operation on one rank.

    It runs twice, to find what the slice ends with and then from what it begins with: what that adds to an output has
    a decay for each element of the state, so that adding it afterwards would be the same work.
    """
    _require_first(here, "initial_state", initial_state)
    inputs = x, dt, A, B, C
    _, state = run(*inputs, D=D, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens)
    rows, dtype = _rows(here, cu_seqlens, x), compute_dtype(x)
    kept = (rows.split(dt).to(dtype).sum(1)[..., None] * A.to(dtype)).exp()  # [B, D, N]
    if rows.reached is not None:
        kept = kept * _broadcast(rows.reached[:, -1], kept.ndim)
    begin = rows.initial(carried(rows.last(state), kept, here.group))
    initial = begin if initial_state is None else begin + initial_state
    return run(*inputs, D=D, initial_state=initial, output_final_state=output_final_state, cu_seqlens=cu_seqlens)


def parallel_short_convolution(
    run: Callable,
    here: Slices,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    left_context: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """`short_convolution` on a slice; `run` is the operation on one rank."""
    _require_first(here, "left_context", left_context)
    reach = weight.shape[1] - 1
    if reach == 0:
        return run(x, weight, bias, left_context=None, seq_idx=seq_idx)
    if x.shape[1] < reach:
        refuse(f"x has {x.shape[1]} tokens per rank, fewer than the {reach} that the convolution reaches back")
    context = carried(x[:, -reach:], x.new_zeros(()), here.group)
    if seq_idx is None:
        if left_context is not None:
            given = left_context[:, max(0, left_context.shape[1] - reach) :]
            context = context + F.pad(given, (0, 0, reach - given.shape[1], 0)).to(x.dtype)
        return run(x, weight, bias, left_context=context, seq_idx=None)
    # Taps reach into an earlier slice of the same document, but with seq_idx never into left_context.
    tail = seq_idx[:, -reach:]
    documents = torch.cat([carried(tail, tail.new_zeros(()), here.group), seq_idx], dim=1)
    return run(torch.cat([context, x], dim=1), weight, bias, left_context=None, seq_idx=documents)[:, reach:]


def _require_first(here: Slices, name: str, value: Tensor | None) -> None:
    if value is not None and here.group.rank() > 0:
        refuse(f"{name} is what stands before the whole sequence; only the first rank of it may give one")


def _rows(here: Slices, cu_seqlens: Tensor | None, tokens: Tensor) -> "Rows":
    if cu_seqlens is not None and (here.seq_idx is None or here.seq_idx.numel() != tokens.shape[1]):
        refuse("cu_seqlens of a slice needs the slice's seq_idx: give it to sequence_parallel")
    return Rows(here.seq_idx, here.continues, cu_seqlens, tokens)


class Rows:
    """The rows of a part of sequences as an operation gets them: [B, T, ...], or laid end to end as [1, B * T, ...].

    Args:
        seq_idx: [B, T], which document each token belongs to; with cu_seqlens.
        continues: [B], whether the first one began before the part; with cu_seqlens.
        cu_seqlens: [S + 1], the borders of the documents of rows laid end to end; None: rows are apart.
        tokens: [B, T, ...] or [1, B * T, ...].
    """

    def __init__(self, seq_idx: Tensor | None, continues: Tensor | None, cu_seqlens: Tensor | None, tokens: Tensor):
        self.shape = tokens.shape[:2]
        self.reached: Tensor | None = None
        self.first_segments: Tensor | None = None
        if cu_seqlens is None:
            return
        assert seq_idx is not None
        assert continues is not None
        num_rows, length = self.shape = seq_idx.shape
        self.continues, self.num_segments = continues, len(cu_seqlens) - 1
        # [B, T]: the tokens that see what the part begins with
        in_first: Tensor = seq_idx == seq_idx[:, :1]
        self.reached = in_first.int().cummin(dim=1).values * continues[:, None]
        starts = length * torch.arange(num_rows, device=cu_seqlens.device)
        first = torch.searchsorted(cu_seqlens, starts.to(cu_seqlens.dtype), right=True) - 1
        last = torch.searchsorted(cu_seqlens, (starts + length).to(cu_seqlens.dtype)) - 1
        self.first_ends = (cu_seqlens[first + 1] - 1 - starts).to(tokens.device)  # token of each row
        self.first_segments, self.last_segments = first.to(tokens.device), last.to(tokens.device)

    def split(self, x: Tensor) -> Tensor:
        """Rows apart: [B, T, ...]."""
        return x.reshape(*self.shape, *x.shape[2:])

    def kept(self, log_decay: Tensor) -> Tensor:
        """[B, T, ...]: how much of what the part begins with is left after each token."""
        kept = self.split(log_decay).cumsum(1).exp()
        return kept if self.reached is None else kept * _broadcast(self.reached, kept.ndim)

    def last(self, states: Tensor) -> Tensor:
        """[B, ...]: the state at the end of each row, of one state per segment."""
        return states if self.first_segments is None else states[self.last_segments]

    def initial(self, begin: Tensor) -> Tensor:
        """What the segments begin with, of the [B, ...] with which the part of each row does."""
        if self.first_segments is None:
            return begin
        states = begin.new_zeros(self.num_segments, *begin.shape[1:])
        return states.index_copy(0, self.first_segments, begin * _broadcast(self.continues, begin.ndim))

    def final(self, states: Tensor, kept: Tensor, begin: Tensor) -> Tensor:
        """The states after each row or segment, with what is left of the states at the part's beginning."""
        if self.first_segments is None:
            left = kept[:, -1]
        else:
            left = kept[torch.arange(len(kept), device=kept.device), self.first_ends]
        return self.added_to_first(states, _broadcast(left, begin.ndim) * begin)

    def first(self, states: Tensor) -> Tensor:
        """[B, ...]: the state after the first segment of each row."""
        return states if self.first_segments is None else states[self.first_segments]

    def added_to_first(self, states: Tensor, left: Tensor) -> Tensor:
        """The states after each row or segment, with `left` [B, ...] added to those of rows' first segments."""
        return states + left if self.first_segments is None else states.index_add(0, self.first_segments, left)
