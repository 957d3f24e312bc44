"""State space duality (Mamba2) on the GPU: Triton forward and backward, and the one-token step.

Shape letters: B batch, T time, H heads, G groups, P head dim, N state size, S segments, NC chunks of C tokens (of
all segments together). The kernels see batch rows as segments of one long row.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.gla.triton_layout import Layout, make_layout
from statex.ops.ssd import triton_kernels as kernels
from statex.ops.ssd.triton_step import triton_ssd_step

__all__ = ["triton_ssd", "triton_ssd_step"]

MAX_REGISTERS = 168  # a thread, where three programs of 4 warps on a processor are worth some spilling


def triton_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t  (arXiv 2405.21060, section 6).

    Arguments and results are those of `chunk_ssd`, on CUDA. A bf16 x means bf16 products with fp32 sums and a bf16
    copy of the state for each chunk; the state itself is carried, given and returned in fp32. Other inputs are
    computed in fp32.
    """
    dtype = x.dtype
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    x, B, C = (tensor.to(work).contiguous() for tensor in (x, B, C))
    initial = None if initial_state is None else initial_state.float().contiguous()
    layout = make_layout(x.shape[0], x.shape[1], cu_seqlens, chunk_size(B.shape[-1], x.shape[1]), x.device)
    D = None if D is None else D.float()
    with torch.cuda.device_of(x):
        output, final = _Ssd.apply(x, dt.contiguous(), A.float(), B, C, D, initial, output_final_state, layout)
    return output.to(dtype), final


def chunk_size(state_size: int, num_tokens: int) -> int:
    """Tokens between two kept states: the larger the state, the fewer of them."""
    chunk = 256 if state_size >= 384 else 128
    return max(64, min(chunk, triton.next_power_of_2(num_tokens)))


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels for one shape and dtype; `_tiles` is the table."""

    part: int  # tokens of a tile, at most a chunk
    head: int  # channels of a head
    scores: tuple[int, int, int]  # state channels a step, warps, stages
    state: tuple[int, int, int, int]  # rows (heads and their channels), state channels, warps, stages
    output: tuple[int, int, int]  # state channels a step, warps, stages
    keys: tuple[int, int, int]  # state channels, warps, stages
    others: int  # tokens a step of attention inside the chunk


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
            state=(64, fit(state_size, 64), 4, 2),
            output=(narrow, 4, 2),
            keys=(fit(state_size, 64), 4, 2),
            others=32,
        )
    part = min(chunk, 128)
    large = rows * state_size >= 128 * 128 * 64
    return Tiles(
        part=part,
        head=fit(head_dim, 128),
        scores=(fit(state_size, 64), 8 if part == 128 else 4, 3),
        state=(128 if large else 64, fit(state_size, 64), 4, 4),
        output=(fit(state_size, 64), 8 if part == 128 else 4, 3),
        keys=(fit(state_size, 128), 8 if part == 128 else 4, 3),
        others=64,
    )


@dataclass(frozen=True)
class Call:
    """One call's inputs and sizes, as the steps below share them."""

    x: Tensor  # [B, T, H, P]
    B: Tensor  # [B, T, G, N]
    C: Tensor  # [B, T, G, N]
    D: Tensor | None
    sums: Tensor  # [NC, H, C]
    steps: Tensor  # [NC, H, C]
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
    def precision(self) -> str:
        return "tf32x3" if self.x.dtype == torch.float32 else "tf32"  # bf16 products ignore it


class _Ssd(torch.autograd.Function):
    """Forward and backward over the kernels; all tensors contiguous."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial, output_final_state, layout):
        call = Call(x, B, C, D, *_sums(dt, A, layout), layout)
        scores = _scores(call)
        final = None
        if output_final_state:
            final = x.new_empty(layout.num_segments, *x.shape[2:], B.shape[3], dtype=torch.float32)
        states = _states(call, initial, final)
        output = torch.empty_like(x)
        _read(call, C, states, scores, x, output)
        ctx.save_for_backward(x, dt, A, B, C, D, initial, call.sums, call.steps, scores, states)
        ctx.layout = layout
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_final):
        x, dt, A, B, C, D, initial, sums, steps, scores, states = ctx.saved_tensors
        call = Call(x, B, C, D, sums, steps, ctx.layout)
        d_output = d_output.contiguous()
        d_initial = torch.empty_like(initial) if initial is not None and ctx.needs_input_grad[6] else None
        scaled = _scaled(call, d_output, to_end=False)
        d_states, through = _state_gradients(call, scaled, d_final, d_initial, states)
        d_scores, row_sums, column_sums = _score_gradients(call, d_output, scores)
        dC, read = _key_gradient(call, scaled, states, d_scores, C, B)
        del scaled
        dx, d_steps, d_D = _value_gradient(call, d_output, d_states, scores)
        dB, write = _key_gradient(call, _scaled(call, x, to_end=True), d_states, d_scores, B, C, transposed=True)
        del d_states
        d_dt, d_A = _decay_gradients(call, dt, A, row_sums, column_sums, read, write, through, d_steps)
        return dx, d_dt, d_A, dB, dC, d_D, d_initial, None, None


def _sums(dt: Tensor, A: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    heads, chunk = dt.shape[2], layout.chunk
    sums, steps = dt.new_empty(2, layout.num_chunks, heads, chunk, dtype=torch.float32).unbind()
    tile = min(16, triton.next_power_of_2(heads))
    kernels.sums_kernel[(layout.num_chunks, triton.cdiv(heads, tile))](
        dt, A, layout.chunk_table, sums, steps, H=heads, C=chunk, BH=tile
    )
    return sums, steps


def _scaled(call: Call, x: Tensor, to_end: bool) -> Tensor:
    heads, head_dim = x.shape[2:]
    layout = call.layout
    out = x.new_empty(layout.num_chunks * layout.chunk, heads, head_dim)
    kernels.scale_kernel[(layout.num_chunks * (layout.chunk // 64), heads)](
        x, call.sums, call.steps, layout.chunk_table, out,
        H=heads, P=head_dim, C=layout.chunk, BP=call.tiles.head, TO_END=to_end,
    )  # fmt: skip
    return out


def _scores(call: Call) -> Tensor:
    layout, (step, warps, stages) = call.layout, call.tiles.scores
    part, groups = call.tiles.part, call.B.shape[2]
    parts = layout.chunk // part
    scores = call.x.new_empty(layout.num_chunks, groups, layout.chunk, layout.chunk)
    kernels.scores_kernel[(layout.num_chunks * (parts * (parts + 1) // 2), groups)](
        call.C, call.B, scores, layout.chunk_table,
        G=groups, N=call.B.shape[3], C=layout.chunk, BM=part, BN=step, PRECISION=call.precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return scores


def _states(call: Call, initial: Tensor | None, final: Tensor | None) -> Tensor:
    """State at the start of each chunk, [NC, H, P, N]; fills `final`."""
    states = call.x.new_empty(call.layout.num_chunks, *call.x.shape[2:], call.B.shape[3])
    _walk(call, _scaled(call, call.x, to_end=True), call.B, initial, states, final)
    return states


def _state_gradients(
    call: Call, scaled: Tensor, d_final: Tensor | None, d_initial: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the state at the end of each chunk [NC, H, P, N], and its overlap with the state at the chunk's
    start; fills `d_initial`."""
    d_states = torch.empty_like(states)
    if d_final is not None:
        d_final = d_final.float().contiguous()
    overlap = _walk(call, scaled, call.C, d_final, d_states, d_initial, states)
    assert overlap is not None  # asked for by giving it the states
    return d_states, overlap


def _walk(
    call: Call,
    x: Tensor,
    y: Tensor,
    first: Tensor | None,
    states: Tensor,
    last: Tensor | None,
    other: Tensor | None = None,
) -> Tensor | None:
    layout, sizes, (tile_r, tile_n, warps, stages) = call.layout, call.sizes, call.tiles.state
    rows, tiles_n = sizes["H"] // sizes["G"] * sizes["P"], triton.cdiv(sizes["N"], tile_n)
    overlap = None
    if other is not None:
        overlap = x.new_empty(tiles_n, layout.num_chunks, sizes["H"] * sizes["P"], dtype=torch.float32)
    kernels.state_kernel[(triton.cdiv(rows, tile_r) * tiles_n, layout.num_segments * sizes["G"])](
        x, y, call.sums, layout.segment_table, first, states, last, other, overlap,
        **sizes, NUM_CHUNKS=layout.num_chunks, BR=tile_r, BN=tile_n, REVERSE=other is not None,
        HAS_FIRST=first is not None, HAS_LAST=last is not None, PRECISION=call.precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return overlap


def _read(
    call: Call,
    reads: Tensor,
    states: Tensor,
    scores: Tensor,
    values: Tensor,
    out: Tensor,
    d_steps: Tensor | None = None,
    d_D: Tensor | None = None,
) -> None:
    """The output; or, given d_steps, the gradient of x."""
    layout, sizes, tiles = call.layout, call.sizes, call.tiles
    step, warps, stages = tiles.output
    grid = (sizes["H"] * triton.cdiv(sizes["P"], tiles.head), layout.num_chunks * (layout.chunk // tiles.part))
    kernels.output_kernel[grid](
        reads, states, scores, values, call.x, call.D, call.sums, call.steps, layout.chunk_table, out, d_steps, d_D,
        **sizes, NUM_CHUNKS=layout.num_chunks, BM=tiles.part, BP=tiles.head, BN=step, BJ=tiles.others,
        TRANSPOSED=d_steps is not None, HAS_D=call.D is not None, PRECISION=call.precision,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _value_gradient(
    call: Call, d_output: Tensor, d_states: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of x; x times the gradient of dt x, summed over head channels; gradient of D."""
    layout, tiles = call.layout, call.tiles
    heads, head_dim = call.x.shape[2:]
    tiles_p = triton.cdiv(head_dim, tiles.head)
    dx = torch.empty_like(call.x)
    d_steps = call.sums.new_empty(tiles_p, *call.sums.shape)
    d_D = None
    if call.D is not None:
        d_D = call.sums.new_empty(tiles_p * layout.num_chunks * (layout.chunk // tiles.part), heads)
    _read(call, call.B, d_states, scores, d_output, dx, d_steps, d_D)
    return dx, d_steps, None if d_D is None else d_D.sum(0)


def _score_gradients(call: Call, d_output: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layout, sizes = call.layout, call.sizes
    blocks = layout.chunk // 64
    d_scores = torch.empty_like(scores)
    sums = call.sums.new_empty(2, layout.num_chunks, sizes["H"], blocks, layout.chunk)
    row_sums, column_sums = sums.unbind()
    kernels.score_gradient_kernel[(layout.num_chunks * (blocks * (blocks + 1) // 2), sizes["G"])](
        d_output, call.x, scores, call.sums, call.steps, layout.chunk_table, d_scores, row_sums, column_sums,
        H=sizes["H"], G=sizes["G"], P=sizes["P"], C=layout.chunk, BP=min(64, call.tiles.head),
        PRECISION=call.precision, num_warps=4, num_stages=3, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return d_scores, row_sums, column_sums


def _key_gradient(
    call: Call,
    x: Tensor,
    states: Tensor,
    d_scores: Tensor,
    own: Tensor,
    other: Tensor,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of C or, transposed, of B; and each head's part through the state times `own`."""
    layout, sizes, tiles = call.layout, call.sizes, call.tiles
    tile_n, warps, stages = tiles.keys
    tile_p = min(64, tiles.head)
    tiles_n, tiles_p = triton.cdiv(sizes["N"], tile_n), triton.cdiv(sizes["P"], tile_p)
    out = torch.empty_like(own)
    overlap = call.sums.new_empty(tiles_n, layout.num_chunks, sizes["H"], tiles_p, layout.chunk)
    kernels.key_gradient_kernel[(tiles_n, layout.num_chunks * (layout.chunk // tiles.part), sizes["G"])](
        x, states, d_scores, own, other, out, overlap, layout.chunk_table,
        **sizes, NUM_CHUNKS=layout.num_chunks, BM=tiles.part, BP=tile_p, BN=tile_n, BJ=tiles.others,
        TRANSPOSED=transposed, PRECISION=call.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, overlap


def _decay_gradients(
    call: Call,
    dt: Tensor,
    A: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    read: Tensor,
    write: Tensor,
    through: Tensor,
    d_steps: Tensor,
) -> tuple[Tensor, Tensor]:
    layout, sizes = call.layout, call.sizes
    d_dt, d_A = torch.empty_like(dt), A.new_empty(layout.num_chunks, sizes["H"])
    kernels.decay_gradient_kernel[(layout.num_chunks, sizes["H"])](
        row_sums, column_sums, read, write, through, d_steps, A, call.steps, layout.chunk_table, d_dt, d_A,
        H=sizes["H"], P=sizes["P"], C=layout.chunk, NUM_CHUNKS=layout.num_chunks, TILES_P=read.shape[3],
        TILES_D=d_steps.shape[0], TILES_N=read.shape[0], TILES_S=through.shape[0],
        BP=min(128, triton.next_power_of_2(sizes["P"])), num_warps=4,
    )  # fmt: skip
    return d_dt, d_A.sum(0)
