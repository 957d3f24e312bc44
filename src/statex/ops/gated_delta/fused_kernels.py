"""Triton kernels of the gated delta rule with a decay a head; docs/kernels.md describes the algorithm. Those that walk
over time are in fused_walks.py.

Shape letters: T time, H heads, K key dim, V value dim, C = 64 tokens of a chunk, N chunks of all segments together, S
segments. Tensors of the caller are [T, H, K or V] (batch and segments laid out one after the other), tensors of chunks
[N, H, ...]. Log decays are natural logarithms; no exponent is positive.

chunk_table [N, 2]: first token of the chunk, number of tokens. factors [N, H, 4, C], fp32, of each token of a chunk:
the log decay from the chunk's start through it, its exponential, the decay behind it to the chunk's end, and beta.
"""

import triton
import triton.language as tl

from statex.ops.gated_delta.fused_tiles import CHUNK, square, state_tile, store_tile, tile

STRONGEST = tl.constexpr(-50.0)  # of a token: it leaves 2e-22 of the state, and sums over a chunk keep their digits
SOLVE = tl.constexpr("tf32x3")  # products of fp32 numbers, to fp32


@triton.jit
def _decays(log_decay):
    """By what a token's writing has decayed at each later one (and itself): [C, C], zeros above the diagonal."""
    rows = tl.arange(0, CHUNK)
    span = log_decay[:, None] - log_decay[None, :]
    return tl.where(rows[:, None] >= rows[None, :], tl.exp(tl.minimum(span, 0.0)), 0.0)


@triton.jit
def _quarters(x, BATCH: tl.constexpr, SIZE: tl.constexpr):
    """Upper left, lower left and lower right of [BATCH, 2 SIZE, 2 SIZE]."""
    parts = tl.permute(tl.reshape(x, (BATCH, 2, SIZE, 2, SIZE)), (0, 2, 4, 1, 3))
    left, right = tl.split(parts)
    upper_left, lower_left = tl.split(left)
    _, lower_right = tl.split(right)
    return upper_left, lower_left, lower_right


@triton.jit
def _pair(first, second, BATCH: tl.constexpr, SIZE: tl.constexpr):
    """Two [BATCH, SIZE, SIZE], in turn: [2 BATCH, SIZE, SIZE]."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), (2 * BATCH, SIZE, SIZE))


@triton.jit
def _join_inverses(x, below, BATCH: tl.constexpr, SIZE: tl.constexpr):
    """Inverses of the blocks on the diagonal [2 BATCH, SIZE, SIZE] and what stands below each first one, to those of
    [BATCH, 2 SIZE, 2 SIZE]."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, (BATCH, 2, SIZE, SIZE)), (0, 2, 3, 1)))
    if BATCH == 1:
        after, before = tl.reshape(lower, (SIZE, SIZE)), tl.reshape(upper, (SIZE, SIZE))
        corner = tl.dot(after, tl.reshape(below, (SIZE, SIZE)), input_precision=SOLVE)
        corner = tl.reshape(tl.dot(corner, before, input_precision=SOLVE), (1, SIZE, SIZE))
    else:
        corner = tl.dot(tl.dot(lower, below, input_precision=SOLVE), upper, input_precision=SOLVE)
    rows = tl.join(tl.join(upper, tl.zeros_like(upper)), tl.join(-corner, lower))  # [.., column half, row half]
    return tl.reshape(tl.permute(rows, (0, 4, 1, 3, 2)), (BATCH, 2 * SIZE, 2 * SIZE))


@triton.jit
def _inverse_of_unit_lower(lower):
    """(I + L)^-1 of L [C, C], strictly lower, fp32: row by row in the blocks of 16, which are then joined in pairs."""
    first, below_first, second = _quarters(tl.reshape(lower, (1, CHUNK, CHUNK)), 1, 32)
    first, below, second = _quarters(_pair(first, second, 1, 32), 2, 16)
    columns = tl.permute(_pair(first, second, 2, 16), (0, 2, 1))  # [block, column, row]
    token = tl.arange(0, 16)
    x = tl.where((token[:, None] == token[None, :])[None], 1.0, 0.0) + tl.zeros((4, 16, 16), tl.float32)
    for i in range(1, 16):
        row = tl.sum(tl.where((token == i)[None, None, :], columns, 0.0), 2)
        x = tl.where((token == i)[None, :, None], x - tl.sum(row[:, :, None] * x, 1)[:, None, :], x)
    x = _join_inverses(_join_inverses(x, below, 2, 16), below_first, 1, 32)
    return tl.reshape(x, (CHUNK, CHUNK))


@triton.jit
def prepare_kernel(
    q, k, log_decay, beta, chunk_table, inverse, reads, factors, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: its factors; reads [N, H, C, C], what each token reads of each one up to it; and the inverse of I + L
    [N, H, C, C], L what each beta takes of the overlaps of its token's key with those of earlier ones, decayed."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, index = tl.arange(0, CHUNK), chunk * H + head
    at = (first.to(tl.int64) + rows) * H + head
    decay = tl.load(log_decay + at, mask=rows < length, other=0.0).to(tl.float32)
    decay = tl.where(decay < STRONGEST, STRONGEST, decay)
    rate = tl.load(beta + at, mask=rows < length, other=0.0).to(tl.float32)
    through = tl.cumsum(decay, 0)
    behind = tl.sum(decay, 0) - through
    own = factors + index.to(tl.int64) * 4 * CHUNK + rows
    tl.store(own, through)
    tl.store(own + CHUNK, tl.exp(through))
    tl.store(own + 2 * CHUNK, tl.exp(tl.minimum(behind, 0.0)))
    tl.store(own + 3 * CHUNK, rate)
    overlaps, products = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for k0 in range(0, K, BK):
        keys = tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        queries = tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        overlaps = tl.dot(keys, tl.trans(keys), overlaps, input_precision=PRECISION)
        products = tl.dot(queries, tl.trans(keys), products, input_precision=PRECISION)
    decays = _decays(through)
    at = index.to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :]
    tl.store(reads + at, (scale * products * decays).to(reads.dtype.element_ty))
    lower = tl.where(rows[:, None] > rows[None, :], rate[:, None] * overlaps * decays, 0.0)
    tl.store(inverse + at, _inverse_of_unit_lower(lower).to(inverse.dtype.element_ty))


@triton.jit
def output_kernel(
    q, states, reads, written, factors, chunk_table, out, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of one chunk's output: scale decay q S + reads written."""
    chunk, head = tl.program_id(1), tl.program_id(2)
    first, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    v0, rows = tl.program_id(0) * BV, tl.arange(0, CHUNK)
    index = chunk * H + head
    weights = square(reads, index, DESCRIBED)
    writes = tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
    since = tl.load(factors + index.to(tl.int64) * 4 * CHUNK + CHUNK + rows)
    result = tl.zeros((CHUNK, BV), tl.float32)
    for k0 in range(0, K, BK):
        queries = tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        state = state_tile(states, index, k0, v0, K, V, BK, BV, DESCRIBED)
        result = tl.dot(queries, state, result, input_precision=PRECISION)
    result = tl.dot(weights, writes, result * (scale * since)[:, None], input_precision=PRECISION)
    store_tile(out, first, length, head, v0, result, H, V, BV, DESCRIBED)


@triton.jit
def gradient_kernel(
    q, k, v, d_out, written, d_wrong, states, d_states, reads, factors, chunk_table,
    dq, dk, dv, d_log_decay, d_beta, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, from what the walk back left.

    That of I + L's inverse needs no product with it: d_L = -d_wrong written^T, below the diagonal. The gradient of a
    log decay is the sum over the pairs (token that wrote, token that reads) around its token.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, index = tl.arange(0, CHUNK), chunk * H + head
    own = factors + index.to(tl.int64) * 4 * CHUNK + rows
    since, until, rate = tl.load(own + CHUNK), tl.load(own + 2 * CHUNK), tl.load(own + 3 * CHUNK)
    d_reads, pairs = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    d_rate = tl.zeros((CHUNK,), tl.float32)
    for v0 in tl.static_range(0, V, BV):
        d_output = tile(d_out, first, length, head, v0, H, V, BV, DESCRIBED)
        writes = tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
        wrong = tile(d_wrong, first, length, head, v0, H, V, BV, DESCRIBED)
        d_reads = tl.dot(d_output, tl.trans(writes), d_reads, input_precision=PRECISION)
        pairs = tl.dot(wrong, tl.trans(writes), pairs, input_precision=PRECISION)
        values = tile(v, first, length, head, v0, H, V, BV, DESCRIBED)
        d_rate += tl.sum(wrong.to(tl.float32) * values.to(tl.float32), 1)
        store_tile(dv, first, length, head, v0, rate[:, None] * wrong.to(tl.float32), H, V, BV, DESCRIBED)
    overlaps = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k0 in range(0, K, BK):
        keys = tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        overlaps = tl.dot(keys, tl.trans(keys), overlaps, input_precision=PRECISION)
    decays = _decays(tl.load(own))
    earlier = rows[:, None] > rows[None, :]
    pairs = tl.where(earlier, pairs * decays, 0.0)  # of overlaps, less the beta of the later token
    d_rate -= tl.sum(pairs * overlaps, 1)
    weights = square(reads, index, DESCRIBED).to(tl.float32)
    around = tl.where(earlier, weights * d_reads, 0.0) - rate[:, None] * pairs * overlaps
    reading = tl.sum(around, 1) - tl.sum(around, 0)  # what begins to be read at a token, less what ends there
    d_products = (scale * decays * d_reads).to(writes.dtype)
    pairs = -rate[:, None] * pairs
    d_overlaps = (pairs + tl.trans(pairs)).to(writes.dtype)
    writing, through = tl.zeros((CHUNK,), tl.float32), tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        # One after the other, for registers
        d_query, d_seen = tl.zeros((CHUNK, BK), tl.float32), tl.zeros((CHUNK, BK), tl.float32)
        d_key = tl.zeros((CHUNK, BK), tl.float32)
        for v0 in tl.static_range(0, V, BV):
            if V > BV:  # else they are here already
                d_output = tile(d_out, first, length, head, v0, H, V, BV, DESCRIBED)
                writes = tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
                wrong = tile(d_wrong, first, length, head, v0, H, V, BV, DESCRIBED)
            state = state_tile(states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            d_state = state_tile(d_states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
            d_query = tl.dot(d_output, tl.trans(state), d_query, input_precision=PRECISION)
            d_seen = tl.dot(wrong, tl.trans(state), d_seen, input_precision=PRECISION)
            d_key = tl.dot(writes, tl.trans(d_state), d_key, input_precision=PRECISION)
        queries = tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        d_query *= (scale * since)[:, None]
        reading += tl.sum(queries.to(tl.float32) * d_query, 1)
        keys = tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        d_query = tl.dot(d_products, keys, d_query, input_precision=PRECISION)
        store_tile(dq, first, length, head, k0, d_query, H, K, BK, DESCRIBED)
        d_seen *= since[:, None]
        seen = tl.sum(keys.to(tl.float32) * d_seen, 1)
        reading -= rate * seen
        d_rate -= seen
        d_key *= until[:, None]
        writing += tl.sum(keys.to(tl.float32) * d_key, 1)
        d_key -= rate[:, None] * d_seen
        d_key = tl.dot(tl.trans(d_products), queries, d_key, input_precision=PRECISION)
        d_key = tl.dot(d_overlaps, keys, d_key, input_precision=PRECISION)
        store_tile(dk, first, length, head, k0, d_key, H, K, BK, DESCRIBED)
    total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
    before = tl.sum(tl.where(earlier, writing[None, :], 0.0), 1)  # a token's own would hide the rest
    d_decay = total * tl.sum(through, 0) + tl.cumsum(reading, 0, reverse=True) + before
    at = (first.to(tl.int64) + rows) * H + head
    tl.store(d_log_decay + at, d_decay.to(d_log_decay.dtype.element_ty), mask=rows < length)
    tl.store(d_beta + at, d_rate.to(d_beta.dtype.element_ty), mask=rows < length)
