"""A variant of the gradient kernel of the gated delta rule, for delta_kernels.py: its products are transposed, so that
no first operand is computed."""

import triton
import triton.language as tl

from statex.ops.gated_delta.fused_tiles import CHUNK, square, state_tile, store_tile, tile


@triton.jit
def _decays(log_decay):
    """By what a token's writing has decayed at each later one (and itself): [C, C], zeros above the diagonal."""
    rows = tl.arange(0, CHUNK)
    span = log_decay[:, None] - log_decay[None, :]
    return tl.where(rows[:, None] >= rows[None, :], tl.exp(tl.minimum(span, 0.0)), 0.0)


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
    d_products = tl.trans((scale * decays * d_reads).to(writes.dtype))  # [writer, reader]
    pairs = -rate[:, None] * pairs
    d_overlaps = (pairs + tl.trans(pairs)).to(writes.dtype)
    writing, through = tl.zeros((CHUNK,), tl.float32), tl.zeros((BK,), tl.float32)
    # Products are computed transposed, so that an operand that is computed goes second (see gla's attention_kernel)
    for k0 in range(0, K, BK):
        d_query, d_seen = tl.zeros((BK, CHUNK), tl.float32), tl.zeros((BK, CHUNK), tl.float32)
        d_key = tl.zeros((BK, CHUNK), tl.float32)
        for v0 in tl.static_range(0, V, BV):
            if V > BV:  # else they are here already
                d_output = tile(d_out, first, length, head, v0, H, V, BV, DESCRIBED)
                writes = tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
                wrong = tile(d_wrong, first, length, head, v0, H, V, BV, DESCRIBED)
            state = state_tile(states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            d_state = state_tile(d_states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
            d_query = tl.dot(state, tl.trans(d_output), d_query, input_precision=PRECISION)
            d_seen = tl.dot(state, tl.trans(wrong), d_seen, input_precision=PRECISION)
            d_key = tl.dot(d_state, tl.trans(writes), d_key, input_precision=PRECISION)
        queries = tl.trans(tile(q, first, length, head, k0, H, K, BK, DESCRIBED))
        d_query *= (scale * since)[None, :]
        reading += tl.sum(queries.to(tl.float32) * d_query, 0)
        keys = tl.trans(tile(k, first, length, head, k0, H, K, BK, DESCRIBED))
        d_query = tl.dot(keys, d_products, d_query, input_precision=PRECISION)
        store_tile(dq, first, length, head, k0, tl.trans(d_query), H, K, BK, DESCRIBED)
        d_seen *= since[None, :]
        seen = tl.sum(keys.to(tl.float32) * d_seen, 0)
        reading -= rate * seen
        d_rate -= seen
        d_key *= until[None, :]
        writing += tl.sum(keys.to(tl.float32) * d_key, 0)
        d_key -= rate[None, :] * d_seen
        d_key = tl.dot(queries, tl.trans(d_products), d_key, input_precision=PRECISION)
        d_key = tl.dot(keys, d_overlaps, d_key, input_precision=PRECISION)
        store_tile(dk, first, length, head, k0, tl.trans(d_key), H, K, BK, DESCRIBED)
    total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
    before = tl.sum(tl.where(earlier, writing[None, :], 0.0), 1)  # a token's own would hide the rest
    d_decay = total * tl.sum(through, 0) + tl.cumsum(reading, 0, reverse=True) + before
    at = (first.to(tl.int64) + rows) * H + head
    tl.store(d_log_decay + at, d_decay.to(d_log_decay.dtype.element_ty), mask=rows < length)
    tl.store(d_beta + at, d_rate.to(d_beta.dtype.element_ty), mask=rows < length)
