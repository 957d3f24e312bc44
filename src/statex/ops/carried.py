"""Sequences in segments, one after the other: what an operation ends a segment with, it begins the next one with.

States and the last inputs of convolutions are passed on as numbers, without their history: so the backward pass of a
segment ends where the segment begins (truncated back-propagation through time), and only one segment's activations
exist at a time. The forward pass is that of the whole sequence.

Shape letters: B rows, T tokens of a segment of each row, D channels, W taps.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from statex.ops.parallel import Rows, slices
from statex.ops.validation import refuse

Place = tuple[int, int]
"""A module, and the number of an operation among those of one call of it."""

_running: "CarriedState | None" = None  # of all threads: gradient checkpointing computes again in one of autograd's own


def carrying() -> "CarriedState | None":
    """What carries states from segment to segment; None outside of a `segment`."""
    return _running


class CarriedState:
    """What the operations of some modules end a segment with; made by `carried_state`."""

    def __init__(self) -> None:
        self.continues: Tensor | None = None
        """[B], whether the document of a row's first token began in a segment before."""
        self.seq_idx: Tensor | None = None
        self._calls: list[Place] = []  # of the modules that are being computed, the innermost last
        self._begins: dict[Place, Any] = {}
        self._ends: dict[Place, Any] = {}
        self._last_document: Tensor | None = None

    @contextmanager
    def segment(self, seq_idx: Tensor | None = None) -> Iterator[None]:
        """Inside, what `gla`, `ssd`, `selective_scan` and `short_convolution` get is the next segment of sequences.

        Forward and backward both belong inside. Of sequences that ranks share, it is this rank's slice of the segment:
        enter `sequence_parallel` first.

        Args:
            seq_idx: [B, T] int, at least 0: which document each token belongs to. Needed for operations with
                cu_seqlens, which must then be the borders of these documents, rows laid end to end.

        Raises:
            ValueError: entered inside another.
        """
        global _running
        if _running is not None:
            refuse("a segment is entered inside another; leave that first")
        self.seq_idx, self.continues = seq_idx, None
        if seq_idx is not None:
            before = self._last_document if _is_first_rank() else None
            self.continues = seq_idx[:, 0] == (-1 if before is None else before)
            self._last_document = _of_last_rank(seq_idx[:, -1])
        _running = self
        try:
            yield
        finally:
            _running = None
        self._begins, self._ends = self._ends, {}

    def begin(self) -> tuple[Place, Any]:
        """Where the operation that is being called stands, and what the segment before ended with there."""
        if not self._calls:
            refuse("an operation is called outside of the modules that carried_state was given")
        module, number = self._calls[-1]
        self._calls[-1] = module, number + 1
        return (module, number), self._begins.get((module, number)) if _is_first_rank() else None

    def end(self, place: Place, *values: Tensor) -> None:
        """Keep what an operation ends with, unless it is only computed again."""
        if place not in self._ends:
            self._ends[place] = tuple(_of_last_rank(value.detach()) for value in values)

    def enter(self, module: nn.Module, *args: Any) -> None:
        """A hook: a module begins to compute, for the first time or again."""
        self._calls.append((id(module), 0))

    def leave(self, *args: Any) -> None:
        """A hook: it is done."""
        self._calls.pop()


@contextmanager
def carried_state(modules: Iterable[nn.Module]) -> Iterator[CarriedState]:
    """Carry states between the segments of sequences, each run inside `segment()` of what this context gives.

    An operation is known by its place among those of one call of its module, so that gradient checkpointing, which
    calls a module again, finds what the module began with.

    Args:
        modules: each of which calls the same operations in the same order for each segment: the mixers of a model.
    """
    carried = CarriedState()
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(carried.enter))
        hooks.append(module.register_forward_hook(carried.leave, always_call=True))
    try:
        yield carried
    finally:
        for hook in hooks:
            hook.remove()


def carried_recurrence(
    run: Callable,
    here: CarriedState,
    *inputs: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """A recurrence on a segment; `run` is the operation without one before."""
    place, begin = here.begin()
    if cu_seqlens is not None and (here.seq_idx is None or here.seq_idx.numel() != inputs[0].shape[1]):
        refuse("cu_seqlens of a segment needs the segment's seq_idx: give it to segment")
    rows = Rows(here.seq_idx, here.continues, cu_seqlens, inputs[0])
    if begin is not None:
        _require_none("initial_state", initial_state)
        initial_state = rows.initial(begin[0])
    output, state = run(*inputs, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens, **options)
    here.end(place, rows.last(state))
    return output, state if output_final_state else None


def carried_short_convolution(
    run: Callable,
    here: CarriedState,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    left_context: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """`short_convolution` on a segment; `run` is the operation without one before."""
    place, begin = here.begin()
    reach = weight.shape[1] - 1
    if begin is not None:
        _require_none("left_context", left_context)
    if seq_idx is None:
        if begin is not None:
            (left_context,) = begin
        here.end(place, _tail(left_context, x, reach))
        return run(x, weight, bias, left_context=left_context, seq_idx=None)
    # Taps reach into an earlier segment of the same document, but with seq_idx never into left_context
    before, documents = begin if begin is not None else (x[:, :0], seq_idx[:, :0])
    here.end(place, _tail(before, x, reach), _tail(documents, seq_idx, reach))
    if begin is None:
        return run(x, weight, bias, left_context=left_context, seq_idx=seq_idx)
    whole, documents = torch.cat([before, x], dim=1), torch.cat([documents, seq_idx], dim=1)
    return run(whole, weight, bias, left_context=None, seq_idx=documents)[:, before.shape[1] :]


def _tail(before: Tensor | None, x: Tensor, length: int) -> Tensor:
    """A copy of the last `length` positions of what is there, without its history."""
    last = x[:, max(0, x.shape[1] - length) :].detach()
    if before is None or last.shape[1] == length:
        return last.clone()
    return torch.cat([before.to(x.dtype), last], dim=1)[:, -length:].clone()


def _require_none(name: str, value: Tensor | None) -> None:
    if value is not None:
        refuse(f"{name} is what stands before the whole sequence; only the first segment of it may have one")


def _is_first_rank() -> bool:
    here = slices()
    return here is None or here.group.rank() == 0


def _of_last_rank(value: Tensor) -> Tensor:
    """What the last of the ranks that share a sequence has."""
    here = slices()
    if here is not None:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, group=here.group, group_src=here.group.size() - 1)
    return value
