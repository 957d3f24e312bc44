"""How tokens of several segments are divided into chunks, as the kernels of both recurrences read it.

Shape letters: T time, N chunks, S segments.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from statex.ops.validation import check_borders


@dataclass(frozen=True)
class Layout:
    """Chunks of all segments together; batch rows are segments of one long row.

    Args:
        chunk: tokens of a chunk; the last one of a segment may hold fewer.
        chunk_table: [N, 2] int32: first token, number of tokens.
        segment_table: [S, 3] int32: first token, one past the last token, first chunk.
        whole: whether no chunk reaches into another segment, so that tiles need no mask: there is one segment, or each
            is a whole number of chunks long.
    """

    chunk: int
    num_chunks: int
    num_segments: int
    chunk_table: Tensor
    segment_table: Tensor
    whole: bool


def make_layout(batch: int, num_tokens: int, cu_seqlens: Tensor | None, chunk: int, device: torch.device) -> Layout:
    """The layout of [batch, num_tokens], or of the segments of one row that `cu_seqlens` [S + 1] borders."""
    if cu_seqlens is None:
        return _from_borders(tuple(range(0, (batch + 1) * num_tokens, num_tokens)), chunk, device)
    borders = cu_seqlens.tolist()
    check_borders(borders, num_tokens)
    return _from_borders(tuple(borders), chunk, device)


def most_chunks(batch: int, num_tokens: int, cu_seqlens: Tensor | None, chunk: int) -> int:
    """The most chunks that a layout of `make_layout` may have, whatever the borders say; sizes may be symbols."""
    if cu_seqlens is None:
        return batch * ((num_tokens + chunk - 1) // chunk)
    return (num_tokens + (cu_seqlens.shape[0] - 1) * (chunk - 1)) // chunk


@lru_cache(maxsize=32)  # the layers of a model share their layouts, and so do forward and backward passes
def _from_borders(borders: tuple[int, ...], chunk: int, device: torch.device) -> Layout:
    chunks: list[tuple[int, ...]] = []
    segments: list[tuple[int, int, int]] = []
    for start, end in pairwise(borders):
        segments.append((start, end, len(chunks)))
        chunks += [(at, min(chunk, end - at)) for at in range(start, end, chunk)]
    chunk_table, segment_table = (
        torch.tensor(rows, dtype=torch.int32).reshape(len(rows), -1).to(device) for rows in (chunks, segments)
    )
    whole = len(segments) == 1 or all((end - start) % chunk == 0 for start, end, _ in segments)
    return Layout(chunk, len(chunks), len(segments), chunk_table, segment_table, whole)


def use_descriptors(layout: Layout, dtype: torch.dtype, *sizes_and_tiles: tuple[int, int]) -> bool:
    """Whether tiles are read and written by descriptors: bf16, no tile that needs a mask, and a device that has the
    tensor memory accelerator."""
    fits = layout.whole and all(size % tile == 0 for size, tile in sizes_and_tiles)
    return fits and dtype == torch.bfloat16 and _has_accelerator(layout.chunk_table.device)


@lru_cache
def _has_accelerator(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9  # Triton's interpreter has it


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and beginning where the tensor memory accelerator can read it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def described(x: Tensor, width: int, tile: tuple[int, int]) -> TensorDescriptor:
    """x as rows of `width` entries, for the tensor memory accelerator, in tiles [rows, columns]; zeros past its end.

    Against loads by pointers it saves their addresses, a quarter of the registers of these kernels.
    """
    # Triton makes the descriptor before it gives the thread its CUDA context. A thread that has launched nothing yet,
    # as that of backward passes, has none and would fail (pytorch/pytorch#124565); this question gives it one.
    if x.is_cuda:
        torch.cuda.is_current_stream_capturing()
    return TensorDescriptor.from_tensor(x.view(-1, width), list(tile))
