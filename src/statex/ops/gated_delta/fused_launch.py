"""The gated delta rule with a decay a head on the GPU: which kernels a pass launches, on tiles of which size.

Shape letters: B batch, T time, H heads, K key dim, V value dim, S segments, N chunks of C tokens (of all segments
together). The kernels see batch rows as segments of one long row.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from statex.ops.gated_delta import fused_kernels as kernels
from statex.ops.gated_delta import fused_tiles
from statex.ops.gated_delta import fused_walks as walks
from statex.ops.triton_layout import Layout, aligned, described, make_layout, use_descriptors

CHUNK = fused_tiles.CHUNK.value
MOST_KEYS = MOST_VALUES = 128
"""Channels of what was tried on a GPU: one block of keys, one tile of values. Beyond them the launches below fail there
(docs/results/kernels.md): the walk back of one stage, and the gradients of two tiles of values, for shared memory."""


class Launch(NamedTuple):
    """Key channels and value channels of a tile, warps, stages."""

    keys: int
    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels for one shape and dtype; `tiles` is the table."""

    prepare: Launch
    walk: Launch
    output: Launch
    walk_back: Launch
    gradient: Launch


@lru_cache
def tiles(key_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    def fit(size: int, largest: int) -> int:
        return max(16, min(largest, triton.next_power_of_2(size)))

    block, half, values = fit(key_dim, 128), fit(key_dim, 64), fit(value_dim, 128)
    narrow = min(values, 32)
    if dtype == torch.float32:
        return Tiles(
            prepare=Launch(fit(key_dim, 32), values, 4, 1),
            walk=Launch(block, narrow, 4, 1),
            output=Launch(fit(key_dim, 32), min(values, 64), 4, 2),
            walk_back=Launch(block, min(narrow, 16), 4, 1),
            gradient=Launch(fit(key_dim, 32), min(values, 32), 4, 1),
        )
    few = key_dim <= block
    return Tiles(
        prepare=Launch(half, values, 4, 2),
        walk=Launch(block, narrow, 4, 3 if few else 2),
        output=Launch(half, values, 4, 3),
        # Of more than two blocks not even two stages fit: there all but the states is read by pointers
        walk_back=Launch(block, narrow, 4, 3 if few else 2) if key_dim <= 2 * block else Launch(block, narrow, 8, 1),
        gradient=Launch(half, values, 4, 2),
    )


def layout_of(q: Tensor, cu_seqlens: Tensor | None) -> Layout:
    return make_layout(q.shape[0], q.shape[1], cu_seqlens, CHUNK, q.device)


class Kept(NamedTuple):
    """What the forward pass makes for itself and for the backward pass."""

    states: Tensor  # [N, H, K, V]: at the start of each chunk
    written: Tensor  # [B, T, H, V]: what each token writes, for its key
    inverse: Tensor  # [N, H, C, C]
    reads: Tensor  # [N, H, C, C]
    factors: Tensor  # [N, H, 4, C]


def room_for(q: Tensor, v: Tensor, num_chunks: int) -> Kept:
    """Room for what is kept of `num_chunks` chunks; also for an operator's fake kernel, where sizes may be symbols."""
    (heads, key_dim), value_dim = q.shape[2:], v.shape[3]
    return Kept(
        states=v.new_empty(num_chunks, heads, key_dim, value_dim),
        written=v.new_empty(v.shape),
        inverse=v.new_empty(num_chunks, heads, CHUNK, CHUNK),
        reads=v.new_empty(num_chunks, heads, CHUNK, CHUNK),
        factors=v.new_empty(num_chunks, heads, 4, CHUNK, dtype=torch.float32),
    )


def state_like(q: Tensor, v: Tensor, num_segments: int) -> Tensor:
    return v.new_empty(num_segments, v.shape[2], q.shape[-1], v.shape[-1], dtype=torch.float32)


@dataclass(frozen=True)
class Views:
    """How the kernels of one call see tensors: by descriptors of the tiles they read and write, or as they are."""

    described: bool
    heads: int
    key_dim: int
    value_dim: int

    def keys(self, x: Tensor, tile: Launch) -> Any:
        return self._rows(x, self.heads * self.key_dim, (CHUNK, tile.keys))

    def values(self, x: Tensor, tile: Launch) -> Any:
        return self._rows(x, self.heads * self.value_dim, (CHUNK, tile.values))

    def states(self, x: Tensor, tile: Launch) -> Any:
        return self._rows(x, self.value_dim, (tile.keys, tile.values))

    def squares(self, x: Tensor) -> Any:
        return self._rows(x, CHUNK, (CHUNK, CHUNK))

    def _rows(self, x: Tensor, width: int, tile: tuple[int, int]) -> Any:
        return described(x, width, tile) if self.described else x


def _views(q: Tensor, v: Tensor, tile: Launch, layout: Layout) -> Views:
    (heads, key_dim), value_dim = q.shape[2:], v.shape[3]
    fits = use_descriptors(layout, v.dtype, (key_dim, tile.keys), (value_dim, tile.values))
    return Views(fits, heads, key_dim, value_dim)


def _constants(q: Tensor, v: Tensor, tile: Launch, views: Views) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return {
        "H": q.shape[2], "K": q.shape[3], "V": v.shape[3], "BK": tile.keys, "BV": tile.values,
        "DESCRIBED": views.described, "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    scale: float,
    final: Tensor | None,
    kept: Kept,
    layout: Layout,
) -> Tensor:
    """The output; fills `final` and `kept`."""
    prepare(q, k, v, log_decay, beta, scale, kept, layout)
    walk(k, v, initial, final, kept, layout)
    return read(q, v, scale, kept, layout)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float, kept: Kept, layout: Layout
) -> None:
    """Fill the factors, what tokens read of one another, and the inverses."""
    tile = tiles(q.shape[3], v.shape[3], v.dtype).prepare
    at = _views(q, v, tile, layout)
    kernels.prepare_kernel[(layout.num_chunks, q.shape[2])](
        at.keys(q, tile), at.keys(k, tile), log_decay, beta, layout.chunk_table,
        kept.inverse, kept.reads, kept.factors, scale, **_constants(q, v, tile, at),
    )  # fmt: skip


def walk(k: Tensor, v: Tensor, initial: Tensor | None, final: Tensor | None, kept: Kept, layout: Layout) -> None:
    """Fill the states, what is written, and the final states."""
    tile = tiles(k.shape[3], v.shape[3], v.dtype).walk
    at = _views(k, v, tile, layout)
    walks.walk_kernel[(triton.cdiv(v.shape[3], tile.values), layout.num_segments * v.shape[2])](
        at.keys(k, tile), at.values(v, tile), at.squares(kept.inverse), kept.factors, layout.segment_table, initial,
        at.states(kept.states, tile), at.values(kept.written, tile), final,
        **_constants(k, v, tile, at), HAS_FIRST=initial is not None, HAS_LAST=final is not None,
    )  # fmt: skip


def read(q: Tensor, v: Tensor, scale: float, kept: Kept, layout: Layout) -> Tensor:
    """The output."""
    tile, output = tiles(q.shape[3], v.shape[3], v.dtype).output, torch.empty_like(v)
    at = _views(q, v, tile, layout)
    kernels.output_kernel[(triton.cdiv(v.shape[3], tile.values), layout.num_chunks, v.shape[2])](
        at.keys(q, tile), at.states(kept.states, tile), at.squares(kept.reads), at.values(kept.written, tile),
        kept.factors, layout.chunk_table, at.values(output, tile), scale, **_constants(q, v, tile, at),
    )  # fmt: skip
    return output


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    d_initial: Tensor | None,
    scale: float,
    kept: Kept,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log_decay and beta; fills `d_initial`."""
    d_output = aligned(d_output)
    d_states, d_wrong = walk_back(d_output, d_final, q, k, v, d_initial, scale, kept, layout)
    return gradients(d_output, d_states, d_wrong, q, k, v, log_decay, beta, scale, kept, layout)


def walk_back(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_initial: Tensor | None,
    scale: float,
    kept: Kept,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Gradients of the state at each chunk's end, and of what each token would write if it were the chunk's first."""
    tile = tiles(k.shape[3], v.shape[3], v.dtype).walk_back
    at = _views(k, v, tile, layout)
    d_states, d_wrong = torch.empty_like(kept.states), torch.empty_like(v)
    if d_final is not None:
        d_final = d_final.float().contiguous()
    inputs = q, k, kept.inverse, kept.reads, d_output
    if k.shape[3] <= 2 * tile.keys:
        inputs = *(at.keys(x, tile) for x in inputs[:2]), *map(at.squares, inputs[2:4]), at.values(d_output, tile)
    walks.walk_back_kernel[(triton.cdiv(v.shape[3], tile.values), layout.num_segments * v.shape[2])](
        *inputs, kept.factors, layout.segment_table, d_final, at.states(d_states, tile), at.values(d_wrong, tile),
        d_initial, scale,
        **_constants(k, v, tile, at), HAS_LAST=d_final is not None, HAS_FIRST=d_initial is not None,
    )  # fmt: skip
    return d_states, d_wrong


def gradients(
    d_output: Tensor,
    d_states: Tensor,
    d_wrong: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    kept: Kept,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Those of q, k, v, log_decay and beta."""
    tile = tiles(k.shape[3], v.shape[3], v.dtype).gradient
    at = _views(k, v, tile, layout)
    dq, dk, dv, d_log_decay, d_beta = found = tuple(map(torch.empty_like, (q, k, v, log_decay, beta)))
    kernels.gradient_kernel[(layout.num_chunks, v.shape[2])](
        at.keys(q, tile), at.keys(k, tile), *(at.values(x, tile) for x in (v, d_output, kept.written, d_wrong)),
        at.states(kept.states, tile), at.states(d_states, tile), at.squares(kept.reads), kept.factors,
        layout.chunk_table, at.keys(dq, tile), at.keys(dk, tile), at.values(dv, tile), d_log_decay, d_beta, scale,
        **_constants(k, v, tile, at),
    )  # fmt: skip
    return found
