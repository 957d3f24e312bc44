"""Grow a tensor by named blocks of rows; independent of families and models."""

import torch

from statex.families.base import Segment, TensorRows


def grow(old: torch.Tensor | None, fresh: torch.Tensor, rows: TensorRows, generator: torch.Generator) -> torch.Tensor:
    """The expanded tensor: old rows where they belong, new rows as each segment says.

    Args:
        old: the tensor before, [sum of num_blocks * before along rows.dim, ...]; None for a tensor that is new.
        fresh: an initialised tensor of the new shape; its rows are taken where a segment's fill is "fresh".
        rows: the segments along `rows.dim`, in the tensor's order.
        generator: draws the noise of copied rows.

    Returns:
        A tensor of the shape, dtype and device of `fresh`.
    """
    new = fresh.movedim(rows.dim, 0)
    source = None if old is None else old.to(fresh).movedim(rows.dim, 0)
    parts, old_start, new_start = [], 0, 0
    for segment in rows.segments:
        old_end = old_start + segment.num_blocks * segment.before
        new_end = new_start + segment.num_blocks * segment.after
        part = new[new_start:new_end].unflatten(0, (segment.num_blocks, segment.after))
        before = None
        if segment.before:
            assert source is not None
            before = source[old_start:old_end].unflatten(0, (segment.num_blocks, segment.before))
        parts.append(_grow_segment(before, part, segment, generator).flatten(0, 1))
        old_start, new_start = old_end, new_end
    assert new_start == new.shape[0], "the segments do not cover the new tensor"
    assert old_start == (source.shape[0] if source is not None else 0), "the segments do not cover the old tensor"
    return torch.cat(parts).movedim(0, rows.dim).contiguous()


def _grow_segment(
    old: torch.Tensor | None, fresh: torch.Tensor, segment: Segment, generator: torch.Generator
) -> torch.Tensor:
    """One segment: old [num_blocks, before, ...] (or None) and fresh [num_blocks, after, ...] to [..., after, ...]."""
    if old is None:
        return torch.zeros_like(fresh) if segment.fill == "zero" else fresh.clone()
    if segment.order is not None:
        old = old[list(segment.order)]
    grown = fresh.clone()
    grown[:, : segment.before] = old
    if segment.after > segment.before:
        if segment.fill == "zero":
            grown[:, segment.before :] = 0
        elif segment.fill == "copy":
            repeats = -(-segment.after // segment.before)
            copies = old.repeat(1, repeats, *[1] * (old.ndim - 2))[:, segment.before : segment.after]
            grown[:, segment.before :] = copies
            if segment.noise:
                noise = torch.randn(copies.shape, generator=generator, dtype=torch.float32).to(copies)
                grown[:, segment.before :] += segment.noise * old.std() * noise
    return grown * segment.scale if segment.scale != 1.0 else grown
