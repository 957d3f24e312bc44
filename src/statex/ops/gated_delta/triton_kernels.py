"""The gated delta rule on the GPU: the walk of its state over the chunks, forward and back, and the inverse in a chunk.

What a token writes depends on the state in all key channels. So a program carries all of them, for a tile of the value
channels, and in memory, where the states have to go in any case: its part of one state stays in the cache until the
next chunk needs it. That sets no limit to the key dimension.

Shape letters: R rows (heads of all sequences), N chunks of C tokens, K key dim, V value dim; D is 1 or K.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from statex.ops.gated_delta.chunk import product

KEY_TILE = 64
MANY = 128  # programs, about one for each processor


@triton.jit
def _tile(pointer, rows, columns, width, num_columns, TRANSPOSED: tl.constexpr):
    """Rows of a matrix [., width], the columns below num_columns; TRANSPOSED: [columns, rows]."""
    if TRANSPOSED:
        at, mask = rows[None, :] * width + columns[:, None], (columns < num_columns)[:, None]
    else:
        at, mask = rows[:, None] * width + columns[None, :], (columns < num_columns)[None, :]
    return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def walk_kernel(
    values, removed, keys, queries, after, decays, states, outputs, written,
    N, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W_n = values_n - removed_n S_n;  outputs_n = queries_n S_n;  S_{n+1} = decay_n S_n + keys_n^T (after_n W_n).

    values, outputs, written [R, N, C, V]; removed, keys, queries [R, N, C, K]; after [R, N, C]; decays [R, N, D];
    states [R, N + 1, K, V], whose first is given. Products are of what the keys are in, sums fp32.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens, columns = tl.arange(0, C), tl.program_id(0) * BV + tl.arange(0, BV)
    for n in range(N):
        chunk, state = row * N + n, states + (row * (N + 1) + n) * K * V
        write = _tile(values + chunk * C * V, tokens, columns, V, V, False)
        output = tl.zeros((C, BV), tl.float32)
        for start in range(0, K, BK):
            channels = start + tl.arange(0, BK)
            inside = (channels < K)[:, None] & (columns < V)[None, :]
            old = tl.load(state + channels[:, None] * V + columns[None, :], mask=inside, other=0.0)
            removal = _tile(removed + chunk * C * K, tokens, channels, K, K, False)
            query = _tile(queries + chunk * C * K, tokens, channels, K, K, False)
            old = old.to(removal.dtype)
            write -= tl.dot(removal, old, input_precision=PRECISION)
            output = tl.dot(query, old, output, input_precision=PRECISION)
        at_tokens = chunk * C * V + tokens[:, None] * V + columns[None, :]
        tl.store(written + at_tokens, write, mask=(columns < V)[None, :])
        tl.store(outputs + at_tokens, output, mask=(columns < V)[None, :])
        write = (write * tl.load(after + chunk * C + tokens)[:, None]).to(keys.dtype.element_ty)
        for start in range(0, K, BK):
            channels = start + tl.arange(0, BK)
            inside = (channels < K)[:, None] & (columns < V)[None, :]
            at = channels[:, None] * V + columns[None, :]
            old = tl.load(state + at, mask=inside, other=0.0)
            decay = tl.load(decays + chunk * D + channels % D, mask=channels < K, other=0.0)
            key = _tile(keys + chunk * C * K, tokens, channels, K, K, True)
            new = tl.dot(key, write, decay[:, None] * old, input_precision=PRECISION)
            tl.store(state + K * V + at, new, mask=inside)
        tl.debug_barrier()  # other threads of the program read what these have stored


@triton.jit
def walk_back_kernel(
    removed, keys, queries, after, decays, d_outputs, d_written, d_states, d_values,
    N, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_values_n = d_written_n + after_n keys_n dS_{n+1};
    dS_n = decay_n dS_{n+1} + queries_n^T d_outputs_n - removed_n^T d_values_n.

    Shapes as in walk_kernel; d_states [R, N + 1, K, V], whose last is given.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens, columns = tl.arange(0, C), tl.program_id(0) * BV + tl.arange(0, BV)
    for step in range(N):
        n = N - 1 - step
        chunk, d_state = row * N + n, d_states + (row * (N + 1) + n) * K * V
        d_output = _tile(d_outputs + chunk * C * V, tokens, columns, V, V, False).to(keys.dtype.element_ty)
        d_write = tl.zeros((C, BV), tl.float32)
        for start in range(0, K, BK):
            channels = start + tl.arange(0, BK)
            inside = (channels < K)[:, None] & (columns < V)[None, :]
            at = K * V + channels[:, None] * V + columns[None, :]
            later = tl.load(d_state + at, mask=inside, other=0.0)
            key = _tile(keys + chunk * C * K, tokens, channels, K, K, False)
            d_write = tl.dot(key, later.to(key.dtype), d_write, input_precision=PRECISION)
        d_write *= tl.load(after + chunk * C + tokens)[:, None]
        d_write += _tile(d_written + chunk * C * V, tokens, columns, V, V, False)
        at_tokens = chunk * C * V + tokens[:, None] * V + columns[None, :]
        tl.store(d_values + at_tokens, d_write, mask=(columns < V)[None, :])
        d_write = d_write.to(keys.dtype.element_ty)
        for start in range(0, K, BK):
            channels = start + tl.arange(0, BK)
            inside = (channels < K)[:, None] & (columns < V)[None, :]
            at = channels[:, None] * V + columns[None, :]
            later = tl.load(d_state + K * V + at, mask=inside, other=0.0)
            decay = tl.load(decays + chunk * D + channels % D, mask=channels < K, other=0.0)
            query = _tile(queries + chunk * C * K, tokens, channels, K, K, True)
            removal = _tile(removed + chunk * C * K, tokens, channels, K, K, True)
            earlier = tl.dot(query, d_output, decay[:, None] * later, input_precision=PRECISION)
            earlier -= tl.dot(removal, d_write, input_precision=PRECISION)
            tl.store(d_state + at, earlier, mask=inside)
        tl.debug_barrier()


@triton.jit
def inverse_kernel(lower, inverse, C: tl.constexpr):
    """Of I + L, L [., C, C] strictly lower (nothing above is read): X_i = e_i - sum_j<i L_ij X_j, row by row."""
    rows, columns = tl.arange(0, C), tl.arange(0, C)
    matrix = tl.program_id(0).to(tl.int64) * C * C
    x = (rows[:, None] == columns[None, :]).to(tl.float32)
    for i in range(1, C):
        row = tl.load(lower + matrix + i * C + rows, mask=rows < i, other=0.0)
        x = tl.where((rows == i)[:, None], x - tl.sum(row[:, None] * x, 0)[None, :], x)
    tl.store(inverse + matrix + rows[:, None] * C + columns[None, :], x)


def inverse_of_unit_lower(strictly_lower: Tensor) -> Tensor:
    """Arguments and results are those of `chunk._inverse`, in fp32."""
    return _Inverse.apply(strictly_lower.contiguous())


class _Inverse(torch.autograd.Function):
    """X = (I + L)^-1, whose gradient is -X^T dX X^T below the diagonal."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = torch.empty_like(lower)
        inverse_kernel[(lower.shape[:-2].numel(),)](lower, inverse, C=lower.shape[-1], num_warps=4)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


def walk_over_chunks(
    values: Tensor, removed: Tensor, keys: Tensor, queries: Tensor, after: Tensor, decays: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results are those of `chunk._across_chunks`; keys, queries and what is removed in bf16 or fp32, all
    else in fp32."""
    chunk = values.shape[-2]
    if missing := max(16, chunk) - chunk:  # what a product on tensor cores takes at least
        values, removed, keys, queries, after = (
            torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (values, removed, keys, queries, after)
        )
    inputs = (x.flatten(0, 1).contiguous() for x in (values, removed, keys, queries, after[..., 0], decays[..., 0]))
    output, written, last = _Walk.apply(*inputs, state)
    return output[:, :, :chunk], written[:, :, :chunk], last


class _Walk(torch.autograd.Function):
    """The walk over [R, N, C, ...], contiguous. What its gradients need no walk for is PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        removed: Tensor,
        keys: Tensor,
        queries: Tensor,
        after: Tensor,
        decays: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (rows, num_chunks, _, num_values), num_keys = values.shape, keys.shape[-1]
        states = values.new_empty(rows, num_chunks + 1, num_keys, num_values)
        states[:, 0] = 0 if state is None else state
        outputs, written = torch.empty_like(values), torch.empty_like(values)
        tensors = values, removed, keys, queries, after, decays, states, outputs, written
        _launch(walk_kernel, tensors, keys, decays, num_values)
        ctx.save_for_backward(removed, keys, queries, after, decays, written, states)
        return outputs, written, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, d_written: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        removed, keys, queries, after, decays, written, states = ctx.saved_tensors
        d_outputs, d_written = d_outputs.contiguous(), d_written.contiguous()
        d_states, d_values = torch.empty_like(states), torch.empty_like(d_written)
        d_states[:, -1] = d_last
        tensors = removed, keys, queries, after, decays, d_outputs, d_written, d_states, d_values
        _launch(walk_back_kernel, tensors, keys, decays, states.shape[-1])
        at_start, d_at_end = states[:, :-1], d_states[:, 1:]
        d_decays = torch.einsum("rnkv,rnkv->rnk", d_at_end, at_start)
        if decays.shape[-1] == 1:
            d_decays = d_decays.sum(-1, keepdim=True)
        dtype = keys.dtype
        at_start, d_at_end = at_start.to(dtype), d_at_end.to(dtype)
        d_after = (written * product(keys, d_at_end, dtype)).sum(-1)
        d_keys = product(after[..., None] * written, d_at_end.mT, dtype)
        d_removed, d_queries = (product(x, at_start.mT, dtype) for x in (-d_values, d_outputs))
        d_first = d_states[:, 0].clone() if ctx.needs_input_grad[6] else None
        gradients = (x.to(dtype) for x in (d_removed, d_keys, d_queries))
        return d_values, *gradients, d_after, d_decays, d_first


def _launch(kernel: Any, tensors: tuple[Tensor, ...], keys: Tensor, decays: Tensor, num_values: int) -> None:
    rows, num_chunks, chunk, num_keys = keys.shape
    tile_k = max(16, min(KEY_TILE, triton.next_power_of_2(num_keys)))
    tile_v = 32 if rows * triton.cdiv(num_values, 32) >= MANY else 16
    kernel[(triton.cdiv(num_values, tile_v), rows)](
        *tensors, num_chunks,
        K=num_keys, V=num_values, D=decays.shape[-1], C=chunk, BK=tile_k, BV=tile_v,
        PRECISION="tf32x3" if keys.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=2,
    )  # fmt: skip
