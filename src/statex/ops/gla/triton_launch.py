"""Gated linear attention on the GPU: which kernels a forward and a backward pass launch, on tiles of which size.

Shape letters: B batch, T time, H heads, K key dim, V value dim, S segments, N chunks of C tokens (of all segments
together). The kernels see batch rows as segments of one long row.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from statex.ops.gla import triton_kernels as kernels
from statex.ops.triton_layout import Layout, aligned, described, make_layout, use_descriptors
from statex.ops.triton_walk import WalkTile, walk

BLOCK = 64  # tokens; the kernels' own
MAX_REGISTERS = 168  # a thread: three programs of 4 warps on a processor
STRONG_DECAY = 64.0  # nats over a block in some channel, beyond which exponents must not be positive


def layout_of(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Layout:
    chunk = chunk_size(q.shape[-1], v.shape[-1], q.shape[1])
    return make_layout(q.shape[0], q.shape[1], cu_seqlens, chunk, q.device)


def chunk_size(key_dim: int, value_dim: int, num_tokens: int) -> int:
    """Tokens between two kept states: the larger the state, the fewer of them. `num_tokens` may be a symbol."""
    chunk = 256 if key_dim * value_dim >= 512 * 1024 else 128
    while chunk > BLOCK and num_tokens <= chunk // 2:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels for one shape and dtype; `_tiles` is the table."""

    part: int  # tokens of a tile, at most a chunk
    prepare: tuple[int, int, int]  # key channels a step, warps, stages
    attention: tuple[int, int, int]  # key channels a step, warps, stages
    state: WalkTile
    output: tuple[int, int, int, int]  # key channels a step, value channels, warps, stages
    d_attention: tuple[int, int, int]  # value channels a step, warps, stages
    keys: tuple[int, int, int, int]  # key channels, value channels a step, warps, stages
    inside: tuple[int, int]  # key channels, warps
    strong: tuple[int, int]  # key channels, warps, where a decay is strong


@lru_cache
def _tiles(key_dim: int, value_dim: int, rows: int, chunk: int, dtype: torch.dtype) -> Tiles:
    """`rows` is the number of heads of all segments: how many states there are."""

    def fit(size: int, largest: int) -> int:
        return max(16, min(largest, triton.next_power_of_2(size)))

    def warps(*tile: int) -> int:
        return 8 if tile[0] * tile[1] >= 128 * 128 else 4

    step_k, step_v = fit(key_dim, 64), fit(value_dim, 64)
    if dtype == torch.float32:
        half_k, half_v = fit(key_dim, 32), fit(value_dim, 32)
        return Tiles(
            part=64,
            prepare=(half_k, 4, 2),
            attention=(half_k, 4, 2),
            state=WalkTile(step_k, step_v, 4, 2),
            output=(half_k, step_v, 4, 2),
            d_attention=(half_v, 4, 2),
            keys=(step_k, half_v, 4, 2),
            inside=(half_k, 4),
            strong=(half_k, 4),
        )
    # In key_gradient_kernel operands of 32 columns came out wrong; those of prepare_kernel are right in every test.
    step_k, step_v = max(64, step_k), max(64, step_v)
    part = min(chunk, 128)
    many = rows * key_dim * value_dim >= 128 * 128 * 64  # (64, 128) fills the processors
    wide_v = max(64, fit(value_dim, 2 * part))
    return Tiles(
        part=part,
        prepare=(32, 4, 3),
        attention=(step_k, 4, 3),
        state=WalkTile(64, max(64, fit(value_dim, 128 if many else 64)), 4, 4),
        output=(step_k, wide_v, warps(part, wide_v), 3),  # a fourth stage, 0.05 ms less, is too much for many GPUs
        d_attention=(step_v, warps(part, part), 3),
        keys=(max(64, fit(key_dim, 128)), step_v, 4, 4),
        inside=(64, 4),  # narrower ones were miscompiled by ptxas 12.8
        strong=(64, 4),
    )


class Kept(NamedTuple):
    """What the forward pass makes for itself and for the backward pass."""

    states: Tensor  # [N, H, K, V]: at the start of each chunk
    rows: Tensor  # [2 or 4, N * C, H, K]: q and k decayed; for gradients alone what rounding to bf16 took from both
    decays: Tensor  # [3, N * C / 64, H, K]: of each block, and of those before and after it
    strong: Tensor  # [N, H]
    attention: Tensor  # [N * C, H, C]


def room_for(q: Tensor, v: Tensor, chunk: int, num_chunks: int, with_rest: bool) -> Kept:
    """Room for what is kept of `num_chunks` chunks; also for an operator's fake kernel, where sizes may be symbols."""
    (heads, key_dim), value_dim = q.shape[2:], v.shape[3]
    tokens = num_chunks * chunk
    return Kept(
        states=v.new_empty(num_chunks, heads, key_dim, value_dim),
        rows=q.new_empty(4 if with_rest else 2, tokens, heads, key_dim),
        decays=q.new_empty(3, tokens // BLOCK, heads, key_dim, dtype=torch.float32),
        strong=q.new_empty(num_chunks, heads, dtype=torch.int32),
        attention=q.new_empty(tokens, heads, chunk),
    )


class Prepared(NamedTuple):
    """What the prepare kernels make of q, k and the decays, as they take it; docstrings there."""

    q_decayed: Tensor  # [N * C, H, K]
    k_decayed: Tensor  # [N * C, H, K]
    q_rest: Tensor | None  # [N * C, H, K]: what rounding to bf16 took away; for gradients alone
    k_rest: Tensor | None
    block_decay: Tensor  # [N * C / 64, H, K]
    before: Tensor  # [N * C / 64, H, K]
    after: Tensor  # [N * C / 64, H, K]
    strong: Tensor  # [N, H]
    attention: Tensor  # [N * C, H, C]


def filled(kept: Kept, layout: Layout) -> tuple[Tensor, Prepared]:
    """The states and the rest, as far as the chunks of the layout go."""
    chunks, tokens = layout.num_chunks, layout.num_chunks * layout.chunk
    states, rows, decays, strong, attention = kept
    if len(states) > chunks:
        states, rows, decays = states[:chunks], rows[:, :tokens], decays[:, : tokens // BLOCK]
        strong, attention = strong[:chunks], attention[:tokens]
    q_decayed, k_decayed, *rest = rows.unbind()
    q_rest, k_rest = rest or (None, None)
    block_decay, before, after = decays.unbind()
    return states, Prepared(q_decayed, k_decayed, q_rest, k_rest, block_decay, before, after, strong, attention)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    scale: float,
    final: Tensor | None,
    states: Tensor,
    prepared: Prepared,
    layout: Layout,
) -> Tensor:
    """The output; fills `final`, `states` and `prepared`."""
    _prepare(q, k, log_decay, scale, prepared, layout)
    walk(
        prepared.k_decayed, v, prepared.block_decay, states, layout, _walk_tile(states, layout),
        first=initial, last=final, use_descriptors=_described(states, layout),
    )  # fmt: skip
    return _read(prepared, states, v, layout)


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    d_initial: Tensor | None,
    scale: float,
    states: Tensor,
    prepared: Prepared,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_decay; fills `d_initial`."""
    d_output = aligned(d_output)
    d_states, overlap = _state_gradients(prepared, d_output, d_final, d_initial, states, layout)
    d_attention, remainder = _attention_gradient(d_output, v, layout)
    dv = _read(prepared, d_states, d_output, layout, transposed=True)
    dq_block, _ = _key_gradient(prepared, d_output, states, d_attention, remainder, layout)
    dk_block, sources = _key_gradient(prepared, v, d_states, d_attention, remainder, layout, transposed=True)
    del d_states
    parts = (dq_block, dk_block, overlap, sources)
    pairs = (d_attention, remainder)
    dq, dk, d_decay = _inside_gradients(q, k, log_decay, prepared, pairs, parts, scale, layout)
    return dq, dk, dv, d_decay


@lru_cache
def _windows(dtype: torch.dtype, device: torch.device) -> Tensor:
    """0/1 matrices [8, 64, 64]: which tokens of a block are summed for each token; the kernels name them."""
    token = torch.arange(BLOCK)
    to, of = token[:, None], token[None, :]
    windows = [
        torch.where((to & size) != 0, of <= to, of > to) & ((to ^ of) < size) for size in (1, 2, 4, 8, 16, 32, 64)
    ]
    return torch.stack([*windows, of <= to]).to(dtype).to(device)


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"  # products of bf16 numbers ignore it


def state_like(v: Tensor, k: Tensor, num_segments: int) -> Tensor:
    return v.new_empty(num_segments, v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float32)


def _prepare(q: Tensor, k: Tensor, log_decay: Tensor, scale: float, prepared: Prepared, layout: Layout) -> None:
    heads, key_dim = q.shape[2:]
    chunk, num_chunks = layout.chunk, layout.num_chunks
    blocks, precision = chunk // BLOCK, _precision(q.dtype)
    exact, windows = q.dtype == torch.float32, _windows(q.dtype, q.device)
    tiles = _tiles(key_dim, key_dim, heads, chunk, q.dtype)
    q_decayed, k_decayed, q_rest, k_rest, block_decay, before, after, strong, attention = prepared
    tile, warps, stages = tiles.prepare
    kernels.prepare_kernel[(num_chunks * blocks, heads)](
        q, k, log_decay, layout.chunk_table, windows, q_decayed, k_decayed, q_rest, k_rest, block_decay, attention,
        scale,
        H=heads, K=key_dim, C=chunk, BK=tile, PRECISION=precision, EXACT=exact, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    tile = max(16, min(1024, triton.next_power_of_2(key_dim)))
    kernels.prefix_kernel[(num_chunks, heads)](
        block_decay, before, after, strong, H=heads, K=key_dim, C=chunk, BK=tile, LIMIT=STRONG_DECAY
    )
    if blocks > 1:
        tile, warps, stages = tiles.attention
        kernels.attention_kernel[(num_chunks * (blocks * (blocks - 1) // 2), heads)](
            q_decayed, k_decayed, before, block_decay, attention,
            H=heads, K=key_dim, C=chunk, BK=tile, PRECISION=precision,
            num_warps=warps, num_stages=stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    tile, warps = tiles.strong
    kernels.strong_attention_kernel[(num_chunks * blocks, heads)](
        q, k, log_decay, layout.chunk_table, windows, strong, attention, scale,
        H=heads, K=key_dim, C=chunk, BK=tile, PRECISION=precision, EXACT=exact, num_warps=warps, num_stages=2,
    )  # fmt: skip


def _state_gradients(
    prepared: Prepared,
    d_output: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor | None,
    states: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Gradient of the state at the end of each chunk [N, H, K, V], and its product with the state at the chunk's
    start, summed over the value channels of each tile; fills `d_initial`."""
    d_states = torch.empty_like(states)
    if d_final is not None:
        d_final = d_final.float().contiguous()
    overlap = walk(
        prepared.q_decayed, d_output, prepared.block_decay, d_states, layout, _walk_tile(states, layout),
        first=d_final, last=d_initial, other=states, use_descriptors=_described(states, layout),
    )  # fmt: skip
    assert overlap is not None  # asked for by giving it the states
    return d_states, overlap


def _described(states: Tensor, layout: Layout) -> bool:
    """Whether descriptors read the states and the tiles that meet them."""
    return use_descriptors(layout, states.dtype, (states.shape[2], 128), (states.shape[3], 128))


def _walk_tile(states: Tensor, layout: Layout) -> WalkTile:
    _, heads, key_dim, value_dim = states.shape
    return _tiles(key_dim, value_dim, heads * layout.num_segments, layout.chunk, states.dtype).state


def _read(prepared: Prepared, states: Tensor, y: Tensor, layout: Layout, transposed: bool = False) -> Tensor:
    """The output; or, transposed, the gradient of v from the gradients of the output and of the states."""
    _, heads, key_dim, value_dim = states.shape
    tiles = _tiles(key_dim, value_dim, heads, layout.chunk, y.dtype)
    tile_k, tile_v, warps, stages = tiles.output
    out = torch.empty_like(y)
    x, table = (prepared.k_decayed, prepared.after) if transposed else (prepared.q_decayed, prepared.before)
    x, in_tiles = _rebased(x, table), _described(states, layout)
    if in_tiles:
        x = described(x, heads * key_dim, (tiles.part, tile_k))
        states = described(states, value_dim, (tile_k, tile_v))
    grid = (triton.cdiv(value_dim, tile_v), layout.num_chunks * (layout.chunk // tiles.part), heads)
    kernels.output_kernel[grid](
        x, states, prepared.attention, y, out, layout.chunk_table,
        H=heads, K=key_dim, V=value_dim, C=layout.chunk, BM=tiles.part, BK=tile_k, BV=tile_v,
        BN=64 if y.dtype == torch.bfloat16 else 32,
        TRANSPOSED=transposed, DESCRIBED=in_tiles, PRECISION=_precision(y.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _rebased(x: Tensor, table: Tensor) -> Tensor:
    """x of each block [N * C, H, K] decayed from the start of its chunk, or to its end, as the table says."""
    tokens, heads, key_dim = x.shape
    out, tile = torch.empty_like(x), max(16, min(128, triton.next_power_of_2(key_dim)))
    kernels.rebase_kernel[(triton.cdiv(key_dim, tile), tokens // BLOCK, heads)](
        x, table, out, H=heads, K=key_dim, BK=tile, num_warps=4
    )
    return out


def _key_gradient(
    prepared: Prepared,
    y: Tensor,
    states: Tensor,
    d_attention: Tensor,
    remainder: Tensor | None,
    layout: Layout,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of q or, transposed, of k (and its `sources`), before the decay inside each block."""
    _, heads, key_dim, value_dim = states.shape
    tiles = _tiles(key_dim, value_dim, heads, layout.chunk, y.dtype)
    tile_k, tile_v, warps, stages = tiles.keys
    tokens = layout.num_chunks * layout.chunk
    out, sources = torch.empty(tokens, heads, key_dim, dtype=torch.float32, device=y.device), None
    keys, queries = (prepared.k_decayed, prepared.k_rest), (prepared.q_decayed, prepared.q_rest)
    other, own = (queries, keys) if transposed else (keys, (None, None))
    if transposed:
        sources = torch.empty_like(prepared.block_decay)
    grid = (triton.cdiv(key_dim, tile_k), tokens // BLOCK, heads)
    dtype, in_tiles = y.dtype, _described(states, layout)
    if in_tiles:
        y = described(y, heads * value_dim, (BLOCK, tile_v))
        states = described(states, value_dim, (tile_k, tile_v))
    kernels.key_gradient_kernel[grid](
        y, states, d_attention, remainder, *other, *own, prepared.block_decay, prepared.strong, layout.chunk_table,
        out, sources,
        H=heads, K=key_dim, V=value_dim, C=layout.chunk, BK=tile_k, BV=tile_v, TRANSPOSED=transposed,
        EXACT=remainder is None, DESCRIBED=in_tiles, PRECISION=_precision(dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, sources


def _attention_gradient(d_output: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Gradient of the attention [N * C, H, C] and, in bf16, its remainder inside each block [N * C, H, 64]."""
    heads, value_dim = v.shape[2:]
    tiles = _tiles(value_dim, value_dim, heads, layout.chunk, v.dtype)
    parts = layout.chunk // tiles.part
    tile_v, warps, stages = tiles.d_attention
    d_attention, remainder = v.new_empty(layout.num_chunks * layout.chunk, heads, layout.chunk), None
    if v.dtype == torch.bfloat16:
        remainder = v.new_empty(layout.num_chunks * layout.chunk, heads, BLOCK)
    kernels.attention_gradient_kernel[(layout.num_chunks * (parts * (parts + 1) // 2), heads)](
        d_output, v, d_attention, remainder, layout.chunk_table,
        H=heads, V=value_dim, C=layout.chunk, BM=tiles.part, BV=tile_v, EXACT=remainder is None,
        PRECISION=_precision(v.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return d_attention, remainder


def _inside_gradients(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    prepared: Prepared,
    pairs: tuple[Tensor, Tensor | None],
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None],
    scale: float,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_dim = q.shape[2:]
    tiles = _tiles(key_dim, key_dim, heads, layout.chunk, q.dtype)
    dq, dk, d_decay = torch.empty_like(q), torch.empty_like(k), torch.empty_like(log_decay)
    for strong, (tile, warps) in ((False, tiles.inside), (True, tiles.strong)):
        kernels.inside_gradient_kernel[(triton.cdiv(key_dim, tile), layout.num_chunks, heads)](
            q, k, log_decay, *pairs, *parts,
            prepared.before, prepared.after, prepared.block_decay, prepared.strong, layout.chunk_table,
            _windows(q.dtype, q.device), dq, dk, d_decay, scale, layout.num_chunks,
            H=heads, K=key_dim, C=layout.chunk, BK=tile, TILES_V=parts[2].shape[0], STRONG=strong,
            PRECISION=_precision(q.dtype), EXACT=q.dtype == torch.float32, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return dq, dk, d_decay
