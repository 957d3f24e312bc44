"""The walk over time that carries a large state in registers; the kernels of both recurrences share it.

Shape letters: T time, H heads, K rows and V columns of a head's state, C tokens per chunk (a state is kept for each),
N chunks of all segments together, S segments; a block is 64 tokens. For `ssd` a "head" is a group, whose K rows are
the channels of all its heads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from statex.ops.triton_layout import Layout, described

BLOCK = tl.constexpr(64)


@dataclass(frozen=True)
class WalkTile:
    """Rows and columns of the state that one program carries, its warps and its stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def _at_step(step, last_block, REVERSE: tl.constexpr):
    """The block that a step of the walk comes to; at its end, the last one again."""
    ahead = tl.minimum(step, last_block)
    return (last_block - ahead if REVERSE else ahead).to(tl.int64)


@triton.jit
def _prefetch(pointers):
    """Bring the lines of 128 bytes into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def walk_kernel(
    x, y, block_decay, segment_table, first, states, last, other_states, overlap,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, DECAY_ROWS: tl.constexpr, NUM_CHUNKS,
    BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    DESCRIBED: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one [BK, BV] tile of a segment's state over time: state = decay state + x^T y, block by block.

    segment_table [S, 3]: first token, one past the last token, first chunk. block_decay [N * C / 64, H, K /
    DECAY_ROWS]: log decay of a block, one for each DECAY_ROWS rows. x is padded [N * C, H, K], y is [T, H, V];
    DESCRIBED: both are descriptors, of [64, BK] and [64, BV], and the state is whole tiles.
    states [N, H, K, V] gets the state at the start of each chunk; REVERSE: that at its end, walking back, and overlap
    [V / BV, N, H, K] that state times other_states, summed over the columns of the tile.
    """
    tile_k, tile_v = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    segment, head = tl.program_id(1) // H, tl.program_id(1) % H
    first_token, end_token = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk = tl.load(segment_table + 3 * segment + 2)
    blocks: tl.constexpr = C // 64
    decays_a_block: tl.constexpr = H * (K // DECAY_ROWS)
    num_blocks = (end_token - first_token + C - 1) // C * blocks
    rows, cols_k, cols_v = tl.arange(0, BLOCK), tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    inside = (cols_k < K)[:, None] & (cols_v < V)[None, :]
    in_state = cols_k[:, None] * V + cols_v[None, :]
    segment_state = (segment * H + head).to(tl.int64) * K * V + in_state
    state = tl.zeros((BK, BV), tl.float32)
    if HAS_FIRST:
        state += tl.load(first + segment_state, mask=inside, other=0.0).to(tl.float32)
    decays = block_decay + (first_chunk * blocks).to(tl.int64) * decays_a_block
    decays += head * (K // DECAY_ROWS) + cols_k // DECAY_ROWS
    # Decays are loaded two steps ahead by hand: the pipeliner does not see them, and a step is shorter than a load.
    any_block = cols_k < tl.where(num_blocks > 0, K, 0)
    last_block = tl.maximum(num_blocks - 1, 0)
    factor = tl.exp(tl.load(decays + _at_step(0, last_block, REVERSE) * decays_a_block, mask=any_block, other=0.0))
    decay = tl.load(decays + _at_step(1, last_block, REVERSE) * decays_a_block, mask=any_block, other=0.0)
    if REVERSE:
        overlap += (tile_v * NUM_CHUNKS).to(tl.int64) * H * K + cols_k
        at_last = ((first_chunk + last_block // blocks) * H + head).to(tl.int64) * K
        other = tl.load(other_states + at_last * V + in_state, mask=inside & any_block[:, None], other=0.0)
        tl.store(overlap + at_last, tl.sum(other.to(tl.float32) * state, 1), mask=any_block)
    for step in range(num_blocks):
        block = num_blocks - 1 - step if REVERSE else step
        at_chunk = ((first_chunk + block // blocks) * H + head).to(tl.int64) * K
        if step % blocks == 0:
            tl.store(states + at_chunk * V + in_state, state.to(states.dtype.element_ty), mask=inside)
            if PREFETCH and step + blocks < num_blocks:
                line = cols_k[:, None] * V + tile_v * BV + tl.arange(0, BV // 64)[None, :] * 64
                _prefetch(other_states + (at_chunk - H * K) * V + line)
        if REVERSE:  # the next chunk's other state, wanted after the product: asked for before it
            arrives = (step % blocks == blocks - 1) & (step < last_block)
            at_next = at_chunk - H * K
            next_other = tl.load(other_states + at_next * V + in_state, mask=inside & arrives, other=0.0)
        padded, token = first_chunk * C + block * BLOCK, first_token + block * BLOCK
        if DESCRIBED:
            x_tile = tl.trans(x.load([padded, head * K + tile_k * BK]))
            y_tile = y.load([token, head * V + tile_v * BV])
        else:
            at = (((padded + rows).to(tl.int64) * H + head) * K)[None, :] + cols_k[:, None]
            x_tile = tl.load(x + at, mask=(cols_k < K)[:, None], other=0.0)
            at = (((token + rows).to(tl.int64) * H + head) * V)[:, None] + cols_v[None, :]
            y_tile = tl.load(y + at, mask=(token + rows < end_token)[:, None] & (cols_v < V)[None, :], other=0.0)
        at_ahead = _at_step(step + 2, last_block, REVERSE) * decays_a_block
        ahead = tl.load(decays + at_ahead, mask=cols_k < K, other=0.0)
        state = tl.dot(x_tile, y_tile, state * factor[:, None], input_precision=PRECISION)
        factor, decay = tl.exp(decay), ahead
        if REVERSE and arrives:
            tl.store(overlap + at_next, tl.sum(next_other.to(tl.float32) * state, 1), mask=cols_k < K)
    if HAS_LAST:
        tl.store(last + segment_state, state, mask=inside)


def walk(
    x: Tensor,
    y: Tensor,
    block_decay: Tensor,
    states: Tensor,
    layout: Layout,
    tile: WalkTile,
    *,
    first: Tensor | None = None,
    last: Tensor | None = None,
    other: Tensor | None = None,
    use_descriptors: bool = False,
) -> Tensor | None:
    """Fill `states` [N, H, K, V] with the state at the start of each chunk, from x^T y over all its tokens.

    Args:
        x: [N * C, H, K], each token decayed to the end of its block; padded with zeros to whole chunks.
        y: [..., H, V], the caller's tokens.
        block_decay: [N * C / 64, H, K or a divisor of it], fp32, natural logarithm.
        first: the state at the start of each segment, [S, H, K, V] fp32, zeros by default.
        last: filled with the state at the end of each segment.
        other: states [N, H, K, V] of a walk forward. This walk then goes back in time: x is decayed from the start of
            its block, `states` gets the state at the end of each chunk, first and last swap their ends.
        use_descriptors: the layout is whole, bf16, and the tiles divide rows and columns.

    Returns:
        with `other`: each state at a chunk's end times `other` at its start, summed over the columns of each tile
        [V / tile.columns, N, H, K].
    """
    num_chunks, heads, rows, columns = states.shape
    tiles_v, overlap = triton.cdiv(columns, tile.columns), None
    if other is not None:
        overlap = torch.empty(tiles_v, num_chunks, heads, rows, dtype=torch.float32, device=x.device)
    precision = "tf32x3" if y.dtype == torch.float32 else "tf32"
    if use_descriptors:
        x = described(x, heads * rows, (BLOCK.value, tile.rows))
        y = described(y, heads * columns, (BLOCK.value, tile.columns))
    walk_kernel[(triton.cdiv(rows, tile.rows) * tiles_v, layout.num_segments * heads)](
        x, y, block_decay, layout.segment_table, first, states, last, other, overlap,
        H=heads, K=rows, V=columns, C=layout.chunk, DECAY_ROWS=rows // block_decay.shape[-1], NUM_CHUNKS=num_chunks,
        BK=tile.rows, BV=tile.columns, REVERSE=other is not None,
        HAS_FIRST=first is not None, HAS_LAST=last is not None,
        DESCRIBED=use_descriptors, PREFETCH=use_descriptors and other is not None and not knobs.runtime.interpret,
        PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return overlap
