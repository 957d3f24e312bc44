"""State space duality (Mamba2) on the GPU: which kernels a forward and a backward pass launch, on which tiles.

Shape letters: B batch, T time, H heads, G groups, P head dim, N state size, S segments, NC chunks of C tokens (of
all segments together). The kernels see batch rows as segments of one long row.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from statex.ops.ssd import triton_kernels as kernels
from statex.ops.triton_layout import Layout, aligned, described, make_layout, use_descriptors
from statex.ops.triton_walk import WalkTile, walk

BLOCK = 64  # tokens; the kernels' own


def layout_of(x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> Layout:
    return make_layout(x.shape[0], x.shape[1], cu_seqlens, chunk_size(B.shape[-1], x.shape[1]), x.device)


def chunk_size(state_size: int, num_tokens: int) -> int:
    """Tokens between two kept states: the larger the state, the fewer of them. `num_tokens` may be a symbol."""
    chunk = 512 if state_size >= 384 else 256 if state_size >= 128 else 128
    while chunk > BLOCK and num_tokens <= chunk // 2:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels for one shape and dtype; `_tiles` is the table."""

    part: int  # tokens of a tile of scores, at most a chunk
    head: int  # channels of a head
    scores: tuple[int, int, int]  # state channels a step, warps, stages
    state: WalkTile  # its rows are heads and their channels
    output: tuple[int, int, int, int]  # state channels a step, warps, stages, registers of a thread at most
    keys: tuple[int, int, int, int]  # tokens, state channels, warps, stages
    near: tuple[int, int, int]  # gradient of the scores inside blocks: warps, stages, registers
    far: tuple[int, int, int]  # and between blocks
    others: int  # tokens per step of the scores' part in the gradients of B and C


@lru_cache
def _tiles(head_dim: int, state_size: int, rows: int, chunk: int, dtype: torch.dtype) -> Tiles:
    """`rows` is the number of state rows: head channels of all heads of all segments."""

    def fit(size: int, largest: int) -> int:
        return max(16, min(largest, triton.next_power_of_2(size)))

    if dtype == torch.float32:
        narrow = fit(state_size, 32)
        return Tiles(
            part=64,
            head=fit(head_dim, 64),
            scores=(narrow, 4, 2),
            state=WalkTile(64, fit(state_size, 64), 4, 2),
            output=(narrow, 4, 2, 255),
            keys=(64, fit(state_size, 64), 4, 2),
            near=(4, 2, 255),
            far=(4, 2, 255),
            others=32,
        )
    part = min(chunk, 128)  # and no tile below 64: one of 32 columns came out wrong in gla's kernels
    many, large_state, fit_state = rows * state_size >= 128 * 128 * 64, state_size > 128, max(64, fit(state_size, 128))
    return Tiles(
        part=part,
        head=max(64, fit(head_dim, 128)),
        scores=(64, 8 if part == 128 else 4, 3),
        state=WalkTile(64, fit_state if many else 64, 4, 4),
        output=(
            64 if large_state else fit_state,
            4 if head_dim <= 64 else 8,
            3 if large_state else 2,
            168 if large_state and head_dim <= 64 else 128,
        ),
        keys=(64, fit_state, 4, 4),
        near=(4, 3, 255),
        far=(4, 3, 168),
        others=64,
    )


class Tables(NamedTuple):
    """Decays and dt, fp32; the docstring of the module of kernels says what each holds."""

    sums: Tensor  # [NC, H, C]
    steps: Tensor  # [NC, H, C]
    to_block_end: Tensor  # [NC, H, C]
    to_end: Tensor  # [NC, H, C]
    block_decay: Tensor  # [NC * C / 64, H]


class Scores(NamedTuple):
    """C B^T inside the chunks, shared by a group's heads."""

    rounded: Tensor  # [NC, G, C, C]
    rest: Tensor | None = None  # [NC, G, C, C]: what rounding to bf16 took away


@dataclass(frozen=True)
class Call:
    """One call's inputs and sizes, as the steps below share them."""

    x: Tensor  # [B, T, H, P]
    B: Tensor  # [B, T, G, N]
    C: Tensor  # [B, T, G, N]
    D: Tensor | None
    tables: Tables
    layout: Layout

    @property
    def tiles(self) -> Tiles:
        rows = self.x.shape[2] * self.x.shape[3] * self.layout.num_segments
        return _tiles(self.x.shape[3], self.B.shape[3], rows, self.layout.chunk, self.x.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """The constants that most kernels take."""
        (heads, head_dim), (groups, state_size) = self.x.shape[2:], self.B.shape[2:]
        return {"H": heads, "G": groups, "P": head_dim, "N": state_size, "C": self.layout.chunk}

    @property
    def in_tiles(self) -> bool:
        """Whether descriptors read and write the tiles."""
        sizes = (self.x.shape[3], self.tiles.head), (self.B.shape[3], 128)
        return use_descriptors(self.layout, self.x.dtype, *sizes)

    @property
    def precision(self) -> str:
        return "tf32x3" if self.x.dtype == torch.float32 else "tf32"  # bf16 products ignore it


class Kept(NamedTuple):
    """What the forward pass makes for itself and for the backward pass."""

    states: Tensor  # [NC, H, P, N]: at the start of each chunk
    scores: Tensor  # [1 or 2, NC, G, C, C]: and, in bf16, what rounding took away
    tables: Tensor  # [4, NC, H, C]
    block_decay: Tensor  # [NC * C / 64, H]


def room_for(x: Tensor, B: Tensor, chunk: int, num_chunks: int) -> Kept:
    """Room for what is kept of `num_chunks` chunks; also for an operator's fake kernel, where sizes may be symbols."""
    (heads, head_dim), (groups, state_size) = x.shape[2:], B.shape[2:]
    return Kept(
        states=x.new_empty(num_chunks, heads, head_dim, state_size),
        scores=x.new_empty(1 if x.dtype == torch.float32 else 2, num_chunks, groups, chunk, chunk),
        tables=x.new_empty(4, num_chunks, heads, chunk, dtype=torch.float32),
        block_decay=x.new_empty(num_chunks * (chunk // BLOCK), heads, dtype=torch.float32),
    )


def filled(kept: Kept, layout: Layout) -> tuple[Tensor, Scores, Tables]:
    """The parts, as far as the chunks of the layout go."""
    chunks = layout.num_chunks
    states, scores, tables, block_decay = kept
    if len(states) > chunks:
        states, scores, tables = states[:chunks], scores[:, :chunks], tables[:, :chunks]
        block_decay = block_decay[: chunks * (layout.chunk // BLOCK)]
    sums, steps, to_block_end, to_end = tables.unbind()
    return states, Scores(*scores.unbind()), Tables(sums, steps, to_block_end, to_end, block_decay)


def state_like(x: Tensor, B: Tensor, num_segments: int) -> Tensor:
    return x.new_empty(num_segments, *x.shape[2:], B.shape[3], dtype=torch.float32)


def forward(
    call: Call, dt: Tensor, A: Tensor, initial: Tensor | None, final: Tensor | None, states: Tensor, scores: Scores
) -> Tensor:
    """The output; fills `final`, `states`, `scores` and the tables of the call."""
    _fill_tables(call, dt, A)
    _fill_scores(call, scores)
    scaled = _scaled(call)
    _walk(call, scaled, call.B, initial, states, final)
    output = torch.empty_like(call.x)
    _read(call, call.C, states, scores, scaled, call.x, output)
    return output


def backward(
    call: Call,
    d_output: Tensor,
    d_final: Tensor | None,
    dt: Tensor,
    A: Tensor,
    d_initial: Tensor | None,
    states: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, dt, A, B, C and D; fills `d_initial`."""
    x, B, C = call.x, call.B, call.C
    d_output = aligned(d_output)
    d_scores, ended, scaled = _score_gradients(call, d_output, scores)
    d_states, through = _state_gradients(call, scaled, d_final, d_initial, states)
    dC, read = _key_gradient(call, d_output, states, d_scores, C, B)
    assert read is not None  # left out for B alone
    dB, _ = _key_gradient(call, x, d_states, d_scores, B, C, transposed=True)
    dx, d_steps, begun, kept, d_D = _value_gradient(call, d_output, scaled, d_states, scores)
    d_dt, d_A = _decay_gradients(call, dt, A, ended, begun, kept, read, through, d_steps)
    return dx, d_dt, d_A, dB, dC, d_D


def _fill_tables(call: Call, dt: Tensor, A: Tensor) -> None:
    layout, heads = call.layout, dt.shape[2]
    tile = min(4096 // layout.chunk, 16, triton.next_power_of_2(heads))
    kernels.sums_kernel[(layout.num_chunks, triton.cdiv(heads, tile))](
        dt, A, layout.chunk_table, *call.tables, H=heads, C=layout.chunk, BH=tile
    )


def _scaled(call: Call) -> Tensor:
    """x dt decayed to the end of its block, [NC * C, H, P]."""
    heads, head_dim = call.x.shape[2:]
    layout = call.layout
    out = call.x.new_empty(layout.num_chunks * layout.chunk, heads, head_dim)
    kernels.scale_kernel[(layout.num_chunks * (layout.chunk // BLOCK), heads)](
        call.x, call.tables.to_block_end, layout.chunk_table, out,
        H=heads, P=head_dim, C=layout.chunk, BP=call.tiles.head,
    )  # fmt: skip
    return out


def _fill_scores(call: Call, scores: Scores) -> None:
    layout, (step, warps, stages) = call.layout, call.tiles.scores
    part, groups = call.tiles.part, call.B.shape[2]
    parts = layout.chunk // part
    kernels.scores_kernel[(layout.num_chunks * (parts * (parts + 1) // 2), groups)](
        call.C, call.B, *scores, layout.chunk_table,
        G=groups, N=call.B.shape[3], C=layout.chunk, BM=part, BN=step, PRECISION=call.precision,
        HAS_REST=scores.rest is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _state_gradients(
    call: Call, scaled: Tensor, d_final: Tensor | None, d_initial: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the state at the end of each chunk [NC, H, P, N], and its overlap with the state at the chunk's
    start [tiles of N, NC, G, H / G * P]; fills `d_initial`."""
    d_states = torch.empty_like(states)
    if d_final is not None:
        d_final = d_final.float().contiguous()
    overlap = _walk(call, scaled, call.C, d_final, d_states, d_initial, states)
    assert overlap is not None  # asked for by giving it the states
    return d_states, overlap


def _walk(
    call: Call,
    scaled: Tensor,
    y: Tensor,
    first: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    other: Tensor | None = None,
) -> Tensor | None:
    """The heads of a group walk as the rows of one state."""
    groups, state_size = y.shape[2:]

    def of_groups(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.view(tensor.shape[0], groups, -1, state_size)

    decay = call.tables.block_decay
    return walk(
        scaled.view(scaled.shape[0], groups, -1), y, decay.view(len(decay), groups, -1),
        states.view(len(states), groups, -1, state_size), call.layout, call.tiles.state,
        first=of_groups(first), last=of_groups(last), other=of_groups(other), use_descriptors=call.in_tiles,
    )  # fmt: skip


def _read(
    call: Call,
    reads: Tensor,
    states: Tensor,
    scores: Scores,
    scaled: Tensor,
    values: Tensor,
    out: Tensor,
    d_steps: Tensor | None = None,
    begun: Tensor | None = None,
    kept: Tensor | None = None,
    d_D: Tensor | None = None,
) -> None:
    """The output; or, given d_steps, the gradient of x."""
    layout, sizes, tiles, tables = call.layout, call.sizes, call.tiles, call.tables
    step, warps, stages, registers = tiles.output
    grid = (sizes["H"] * triton.cdiv(sizes["P"], tiles.head), layout.num_chunks * (layout.chunk // BLOCK))
    far_scores = scores.rounded
    if call.in_tiles:
        reads = described(reads, sizes["G"] * sizes["N"], (BLOCK, step))
        states = described(states, sizes["N"], (tiles.head, step))
        far_scores = described(far_scores, sizes["C"], (BLOCK, BLOCK))
        scaled = described(scaled, sizes["H"] * sizes["P"], (BLOCK, tiles.head))
    kernels.output_kernel[grid](
        reads, states, far_scores, *scores, scaled, values, call.x, call.D, tables.sums, tables.steps,
        tables.to_block_end, tables.block_decay, layout.chunk_table, out, d_steps, begun, kept, d_D,
        **sizes, NUM_CHUNKS=layout.num_chunks, BP=tiles.head, BN=step,
        TRANSPOSED=d_steps is not None, HAS_D=call.D is not None, HAS_REST=scores.rest is not None,
        DESCRIBED=call.in_tiles, PRECISION=call.precision,
        num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip


def _value_gradient(
    call: Call, d_output: Tensor, scaled: Tensor, d_states: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradient of x; x times the gradient of dt x, summed over head channels, and dt times its parts from the
    chunk's later blocks and from after the chunk; gradient of D."""
    layout, tiles = call.layout, call.tiles
    heads, head_dim = call.x.shape[2:]
    tiles_p = triton.cdiv(head_dim, tiles.head)
    dx = torch.empty_like(call.x)
    d_steps, begun, kept = call.tables.sums.new_empty(3, tiles_p, *call.tables.sums.shape).unbind()
    d_D = None
    if call.D is not None:
        d_D = call.tables.sums.new_empty(tiles_p * layout.num_chunks * (layout.chunk // BLOCK), heads)
    _read(call, call.B, d_states, scores, scaled, d_output, dx, d_steps, begun, kept, d_D)
    return dx, d_steps, begun, kept, None if d_D is None else d_D.sum(0)


def _score_gradients(call: Call, d_output: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the scores [NC, G, C, C]; its products with the scores, summed over each token's sources by their
    block, and for tokens before it moments [NC, H, C / 64, C]; the gradient of the output decayed from the start of
    each block, [NC * C, H, P]."""
    layout, sizes, tables = call.layout, call.sizes, call.tables
    blocks = layout.chunk // BLOCK
    d_scores = torch.empty_like(scores.rounded)
    ended = tables.sums.new_empty(layout.num_chunks, sizes["H"], blocks, layout.chunk)
    scaled = call.x.new_empty(layout.num_chunks * layout.chunk, *call.x.shape[2:])
    head_tile = min(64, call.tiles.head)
    tensors = (d_output, call.x, scaled)
    if call.in_tiles:
        tensors = tuple(described(x, sizes["H"] * sizes["P"], (BLOCK, head_tile)) for x in tensors)
    constants = {
        "H": sizes["H"], "G": sizes["G"], "P": sizes["P"], "C": layout.chunk, "BP": head_tile,
        "HAS_REST": scores.rest is not None, "DESCRIBED": call.in_tiles, "PRECISION": call.precision,
    }  # fmt: skip
    warps, stages, registers = call.tiles.near
    kernels.near_score_gradient_kernel[(layout.num_chunks * blocks, sizes["G"])](
        *tensors[:2], *scores, tables.sums, tables.steps, layout.chunk_table, d_scores, ended, tensors[2],
        **constants, num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    if blocks > 1:
        warps, stages, registers = call.tiles.far
        kernels.far_score_gradient_kernel[(layout.num_chunks * (blocks * (blocks - 1) // 2), sizes["G"])](
            *tensors[:2], *scores, tables.sums, tables.to_block_end, layout.chunk_table, d_scores, ended,
            **constants, num_warps=warps, num_stages=stages, maxnreg=registers,
        )  # fmt: skip
    return d_scores, ended, scaled


def _key_gradient(
    call: Call,
    x: Tensor,
    states: Tensor,
    d_scores: Tensor,
    own: Tensor,
    other: Tensor,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of C and each head's part through the state times C; or, transposed, the gradient of B."""
    layout, sizes, tiles = call.layout, call.sizes, call.tiles
    tile_m, tile_n, warps, stages = tiles.keys
    tile_p = min(64, tiles.head)
    tiles_n, tiles_p = triton.cdiv(sizes["N"], tile_n), triton.cdiv(sizes["P"], tile_p)
    out, overlap, factors = torch.empty_like(own), None, call.tables.to_end
    if not transposed:
        factors = call.tables.sums
        overlap = call.tables.sums.new_empty(tiles_n, layout.num_chunks, sizes["H"], tiles_p, layout.chunk)
    if call.in_tiles:
        x = described(x, sizes["H"] * sizes["P"], (tile_m, tile_p))
        states = described(states, sizes["N"], (tile_p, tile_n))
    kernels.key_gradient_kernel[(tiles_n, layout.num_chunks * (layout.chunk // tile_m), sizes["G"])](
        x, states, d_scores, own, other, factors, out, overlap, layout.chunk_table,
        **sizes, NUM_CHUNKS=layout.num_chunks, BM=tile_m, BP=tile_p, BN=tile_n, BJ=tiles.others,
        TRANSPOSED=transposed, DESCRIBED=call.in_tiles, PRECISION=call.precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, overlap


def _decay_gradients(
    call: Call,
    dt: Tensor,
    A: Tensor,
    ended: Tensor,
    begun: Tensor,
    kept: Tensor,
    read: Tensor,
    through: Tensor,
    d_steps: Tensor,
) -> tuple[Tensor, Tensor]:
    layout, sizes, tables = call.layout, call.sizes, call.tables
    d_dt, d_A = torch.empty_like(dt), A.new_empty(layout.num_chunks, sizes["H"])
    kernels.decay_gradient_kernel[(layout.num_chunks, sizes["H"])](
        ended, begun, kept, read, through, d_steps, A, tables.sums, tables.steps,
        tables.to_block_end, layout.chunk_table, d_dt, d_A,
        H=sizes["H"], P=sizes["P"], C=layout.chunk, NUM_CHUNKS=layout.num_chunks, TILES_P=read.shape[3],
        TILES_D=d_steps.shape[0], TILES_N=read.shape[0], TILES_S=through.shape[0],
        BP=min(128, triton.next_power_of_2(sizes["P"])), num_warps=4,
    )  # fmt: skip
    return d_dt, d_A.sum(0)
