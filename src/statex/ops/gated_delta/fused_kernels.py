"""Triton kernels of the gated delta rule with a decay a head; docs/kernels.md describes the algorithm.

Shape letters: T time, H heads, K key dim, V value dim, C = 64 tokens of a chunk, N chunks of all segments together, S
segments. Tensors of the caller are [T, H, K or V] (batch and segments laid out one after the other), tensors of chunks
[N, H, ...]. Log decays are natural logarithms; no exponent is positive.

chunk_table [N, 2]: first token of the chunk, number of tokens. factors [N, H, 4, C], fp32, of each token of a chunk: the
log decay from the chunk's start through it, its exponential, the decay behind it to the chunk's end, and beta.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
STRONGEST = tl.constexpr(-50.0)  # of a token: beyond it nothing that any dtype holds is left, and sums stay exact
SOLVE = tl.constexpr("tf32x3")  # products of fp32 numbers, to fp32


@triton.jit
def _tile(
    x, first, length, head, c0,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of one head of one chunk's tokens [., H, D]; zeros past its length. DESCRIBED: x is a descriptor."""
    if DESCRIBED:
        tile = x.load([first, head * D + c0])
    else:
        rows, cols = tl.arange(0, CHUNK), c0 + tl.arange(0, WIDTH)
        at = (first.to(tl.int64) * H + head) * D + (rows * (H * D))[:, None] + cols[None, :]
        tile = tl.load(x + at, mask=(rows < length)[:, None] & (cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(
    x, first, length, head, c0, tile,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        x.store([first, head * D + c0], tile.to(x.dtype))
    else:
        rows, cols = tl.arange(0, CHUNK), c0 + tl.arange(0, WIDTH)
        at = (first.to(tl.int64) * H + head) * D + (rows * (H * D))[:, None] + cols[None, :]
        mask = (rows < length)[:, None] & (cols < D)[None, :]
        tl.store(x + at, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _state_tile(
    states, index, k0, v0,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[BK, BV] of one state [K, V]."""
    if DESCRIBED:
        tile = states.load([index * K + k0, v0])
    else:
        rows, cols = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
        at = (index.to(tl.int64) * K + rows)[:, None] * V + cols[None, :]
        tile = tl.load(states + at, mask=(rows < K)[:, None] & (cols < V)[None, :], other=0.0)
    return tile


@triton.jit
def _store_state_tile(
    states, index, k0, v0, tile,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        states.store([index * K + k0, v0], tile)
    else:
        rows, cols = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
        at = (index.to(tl.int64) * K + rows)[:, None] * V + cols[None, :]
        tl.store(states + at, tile, mask=(rows < K)[:, None] & (cols < V)[None, :])


@triton.jit
def _square(x, index, DESCRIBED: tl.constexpr):
    """[C, C] out of [., C, C]."""
    if DESCRIBED:
        tile = x.load([index * CHUNK, 0])
    else:
        rows = tl.arange(0, CHUNK)
        tile = tl.load(x + index.to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :])
    return tile


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
    upper_right, lower_right = tl.split(right)
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
        keys = _tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        queries = _tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        overlaps = tl.dot(keys, tl.trans(keys), overlaps, input_precision=PRECISION)
        products = tl.dot(queries, tl.trans(keys), products, input_precision=PRECISION)
    decays = _decays(through)
    at = index.to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :]
    tl.store(reads + at, (scale * products * decays).to(reads.dtype.element_ty))
    lower = tl.where(rows[:, None] > rows[None, :], rate[:, None] * overlaps * decays, 0.0)
    tl.store(inverse + at, _inverse_of_unit_lower(lower).to(inverse.dtype.element_ty))


@triton.jit
def _given_state(state, index, v0, BLOCK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """A block of [K, V] in fp32, or zeros."""
    if GIVEN:
        tile = _state_tile(state, index, BLOCK * BK, v0, K, V, BK, BV, False)
    else:
        tile = tl.zeros((BK, BV), tl.float32)
    return tile


@triton.jit
def _keep_and_read(
    state, states, keys, seen, index, v0, BLOCK: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a block of the state; `seen` and what the keys read of the block."""
    low = state.to(keys.dtype)
    _store_state_tile(states, index, BLOCK * BK, v0, low, K, V, BK, BV, DESCRIBED)
    return tl.dot(keys, low, seen, input_precision=PRECISION)


@triton.jit
def walk_kernel(
    k, v, inverse, factors, segment_table, first_state, states, written, last_state,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk BV columns of a segment's state over its chunks, all K rows in up to four blocks of BK: written = inverse
    (beta (v - decay k S)), S = decay S + k^T (decay written); states [N, H, K, V] gets S at the start of each chunk.

    segment_table [S, 3]: first token, one past the last token, first chunk.
    """
    head, segment = tl.program_id(1) % H, tl.program_id(1) // H
    first, end = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk, num_chunks = tl.load(segment_table + 3 * segment + 2), tl.cdiv(end - first, CHUNK)
    v0, rows, at_segment = tl.program_id(0) * BV, tl.arange(0, CHUNK), segment * H + head
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    state = _given_state(first_state, at_segment, v0, 0, K, V, BK, BV, HAS_FIRST)
    if BLOCKS > 1:
        state_1 = _given_state(first_state, at_segment, v0, 1, K, V, BK, BV, HAS_FIRST)
    if BLOCKS > 2:
        state_2 = _given_state(first_state, at_segment, v0, 2, K, V, BK, BV, HAS_FIRST)
    if BLOCKS > 3:
        state_3 = _given_state(first_state, at_segment, v0, 3, K, V, BK, BV, HAS_FIRST)
    # The factors are loaded a step ahead by hand: the pipeliner does not see them
    any_token = rows < tl.where(num_chunks > 0, CHUNK, 0)
    own = factors + (first_chunk * H + head).to(tl.int64) * 4 * CHUNK + rows
    since = tl.load(own + CHUNK, mask=any_token, other=0.0)
    until = tl.load(own + 2 * CHUNK, mask=any_token, other=0.0)
    rate = tl.load(own + 3 * CHUNK, mask=any_token, other=0.0)
    for n in range(num_chunks):
        token, index = first + n * CHUNK, (first_chunk + n) * H + head
        ahead = tl.where(n + 1 < num_chunks, H * 4 * CHUNK, 0)
        next_since = tl.load(own + ahead + CHUNK)
        next_until = tl.load(own + ahead + 2 * CHUNK)
        next_rate = tl.load(own + ahead + 3 * CHUNK)
        values = _tile(v, token, end - token, head, v0, H, V, BV, DESCRIBED)
        solve = _square(inverse, index, DESCRIBED)
        seen = tl.zeros((CHUNK, BV), tl.float32)
        keys = _tile(k, token, end - token, head, 0, H, K, BK, DESCRIBED)
        seen = _keep_and_read(state, states, keys, seen, index, v0, 0, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 1:
            keys_1 = _tile(k, token, end - token, head, BK, H, K, BK, DESCRIBED)
            seen = _keep_and_read(state_1, states, keys_1, seen, index, v0, 1, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 2:
            keys_2 = _tile(k, token, end - token, head, 2 * BK, H, K, BK, DESCRIBED)
            seen = _keep_and_read(state_2, states, keys_2, seen, index, v0, 2, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 3:
            keys_3 = _tile(k, token, end - token, head, 3 * BK, H, K, BK, DESCRIBED)
            seen = _keep_and_read(state_3, states, keys_3, seen, index, v0, 3, K, V, BK, BV, DESCRIBED, PRECISION)
        wrong = rate[:, None] * (values.to(tl.float32) - since[:, None] * seen)
        write = tl.dot(solve, wrong.to(keys.dtype), input_precision=PRECISION)
        _store_tile(written, token, end - token, head, v0, write, H, V, BV, DESCRIBED)
        total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
        late = (until[:, None] * write).to(keys.dtype)
        state = tl.dot(tl.trans(keys), late, state * total, input_precision=PRECISION)
        if BLOCKS > 1:
            state_1 = tl.dot(tl.trans(keys_1), late, state_1 * total, input_precision=PRECISION)
        if BLOCKS > 2:
            state_2 = tl.dot(tl.trans(keys_2), late, state_2 * total, input_precision=PRECISION)
        if BLOCKS > 3:
            state_3 = tl.dot(tl.trans(keys_3), late, state_3 * total, input_precision=PRECISION)
        since, until, rate, own = next_since, next_until, next_rate, own + ahead
    if HAS_LAST:
        _store_state_tile(last_state, at_segment, 0, v0, state, K, V, BK, BV, False)
        if BLOCKS > 1:
            _store_state_tile(last_state, at_segment, BK, v0, state_1, K, V, BK, BV, False)
        if BLOCKS > 2:
            _store_state_tile(last_state, at_segment, 2 * BK, v0, state_2, K, V, BK, BV, False)
        if BLOCKS > 3:
            _store_state_tile(last_state, at_segment, 3 * BK, v0, state_3, K, V, BK, BV, False)


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
    weights = _square(reads, index, DESCRIBED)
    writes = _tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
    since = tl.load(factors + index.to(tl.int64) * 4 * CHUNK + CHUNK + rows)
    result = tl.zeros((CHUNK, BV), tl.float32)
    for k0 in range(0, K, BK):
        queries = _tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        state = _state_tile(states, index, k0, v0, K, V, BK, BV, DESCRIBED)
        result = tl.dot(queries, state, result, input_precision=PRECISION)
    result = tl.dot(weights, writes, result * (scale * since)[:, None], input_precision=PRECISION)
    _store_tile(out, first, length, head, v0, result, H, V, BV, DESCRIBED)


@triton.jit
def _before(
    d_state, q, k, keys, total, read, removed, token, length, head, BLOCK: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of the gradient of the state, a chunk earlier."""
    queries = _tile(q, token, length, head, BLOCK * BK, H, K, BK, DESCRIBED)
    d_state = tl.dot(tl.trans(queries), read, d_state * total, input_precision=PRECISION)
    if 2 * BK < K:  # again, for registers
        keys = _tile(k, token, length, head, BLOCK * BK, H, K, BK, DESCRIBED)
    return tl.dot(tl.trans(keys), removed, d_state, input_precision=PRECISION)


@triton.jit
def walk_back_kernel(
    q, k, inverse, reads, d_out, factors, segment_table, d_last_state, d_states, d_wrong, d_first_state, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_LAST: tl.constexpr, HAS_FIRST: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk BV columns of the gradient of a segment's state back over its chunks; d_states [N, H, K, V] gets that at
    each chunk's end.

    d_written = reads^T d_out + decay k dS;  d_wrong = inverse^T d_written, of beta (v - decay k S);  dS = decay dS +
    q^T (scale decay d_out) - k^T (decay beta d_wrong).
    """
    head, segment = tl.program_id(1) % H, tl.program_id(1) // H
    first, end = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk, num_chunks = tl.load(segment_table + 3 * segment + 2), tl.cdiv(end - first, CHUNK)
    v0, rows, at_segment = tl.program_id(0) * BV, tl.arange(0, CHUNK), segment * H + head
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    state = _given_state(d_last_state, at_segment, v0, 0, K, V, BK, BV, HAS_LAST)
    if BLOCKS > 1:
        state_1 = _given_state(d_last_state, at_segment, v0, 1, K, V, BK, BV, HAS_LAST)
    if BLOCKS > 2:
        state_2 = _given_state(d_last_state, at_segment, v0, 2, K, V, BK, BV, HAS_LAST)
    if BLOCKS > 3:
        state_3 = _given_state(d_last_state, at_segment, v0, 3, K, V, BK, BV, HAS_LAST)
    LOADED: tl.constexpr = DESCRIBED and BLOCKS <= 2
    any_token = rows < tl.where(num_chunks > 0, CHUNK, 0)
    last_chunk = first_chunk + tl.maximum(num_chunks - 1, 0)
    own = factors + (last_chunk * H + head).to(tl.int64) * 4 * CHUNK + rows
    since = tl.load(own + CHUNK, mask=any_token, other=0.0)
    until = tl.load(own + 2 * CHUNK, mask=any_token, other=0.0)
    rate = tl.load(own + 3 * CHUNK, mask=any_token, other=0.0)
    for step in range(num_chunks):
        n = num_chunks - 1 - step
        token, index = first + n * CHUNK, (first_chunk + n) * H + head
        length = end - token
        ahead = tl.where(n > 0, H * 4 * CHUNK, 0)
        next_since = tl.load(own - ahead + CHUNK)
        next_until = tl.load(own - ahead + 2 * CHUNK)
        next_rate = tl.load(own - ahead + 3 * CHUNK)
        d_output = _tile(d_out, token, length, head, v0, H, V, BV, LOADED)
        solve, weights = _square(inverse, index, LOADED), _square(reads, index, LOADED)
        seen = tl.zeros((CHUNK, BV), tl.float32)
        keys = _tile(k, token, length, head, 0, H, K, BK, LOADED)
        seen = _keep_and_read(state, d_states, keys, seen, index, v0, 0, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 1:
            keys_1 = _tile(k, token, length, head, BK, H, K, BK, LOADED)
            seen = _keep_and_read(state_1, d_states, keys_1, seen, index, v0, 1, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 2:
            keys_2 = _tile(k, token, length, head, 2 * BK, H, K, BK, LOADED)
            seen = _keep_and_read(state_2, d_states, keys_2, seen, index, v0, 2, K, V, BK, BV, DESCRIBED, PRECISION)
        if BLOCKS > 3:
            keys_3 = _tile(k, token, length, head, 3 * BK, H, K, BK, LOADED)
            seen = _keep_and_read(state_3, d_states, keys_3, seen, index, v0, 3, K, V, BK, BV, DESCRIBED, PRECISION)
        d_write = tl.dot(tl.trans(weights), d_output, until[:, None] * seen, input_precision=PRECISION)
        wrong = tl.dot(tl.trans(solve), d_write.to(keys.dtype), input_precision=PRECISION)
        _store_tile(d_wrong, token, length, head, v0, wrong, H, V, BV, DESCRIBED)
        total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
        read = ((scale * since)[:, None] * d_output.to(tl.float32)).to(keys.dtype)
        removed = (-(rate * since)[:, None] * wrong).to(keys.dtype)
        state = _before(
            state, q, k, keys, total, read, removed, token, length, head, 0, H, K, BK, LOADED, PRECISION
        )  # fmt: skip
        if BLOCKS > 1:
            state_1 = _before(
                state_1, q, k, keys_1, total, read, removed, token, length, head, 1, H, K, BK, LOADED, PRECISION
            )  # fmt: skip
        if BLOCKS > 2:
            state_2 = _before(
                state_2, q, k, keys_2, total, read, removed, token, length, head, 2, H, K, BK, LOADED, PRECISION
            )  # fmt: skip
        if BLOCKS > 3:
            state_3 = _before(
                state_3, q, k, keys_3, total, read, removed, token, length, head, 3, H, K, BK, LOADED, PRECISION
            )  # fmt: skip
        since, until, rate, own = next_since, next_until, next_rate, own - ahead
    if HAS_FIRST:
        _store_state_tile(d_first_state, at_segment, 0, v0, state, K, V, BK, BV, False)
        if BLOCKS > 1:
            _store_state_tile(d_first_state, at_segment, BK, v0, state_1, K, V, BK, BV, False)
        if BLOCKS > 2:
            _store_state_tile(d_first_state, at_segment, 2 * BK, v0, state_2, K, V, BK, BV, False)
        if BLOCKS > 3:
            _store_state_tile(d_first_state, at_segment, 3 * BK, v0, state_3, K, V, BK, BV, False)


@triton.jit
def gradient_kernel(
    q, k, v, d_out, written, d_wrong, states, d_states, reads, factors, chunk_table,
    dq, dk, dv, d_log_decay, d_beta, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, from what the walk back left.

    That of I + L's inverse needs no product with it: d_L = -d_wrong written^T, below the diagonal. The gradient of a log
    decay is the sum over the pairs (token that wrote, token that reads) around its token.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, index = tl.arange(0, CHUNK), chunk * H + head
    own = factors + index.to(tl.int64) * 4 * CHUNK + rows
    since, until, rate = tl.load(own + CHUNK), tl.load(own + 2 * CHUNK), tl.load(own + 3 * CHUNK)
    d_reads, pairs = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    d_rate = tl.zeros((CHUNK,), tl.float32)
    for v0 in tl.static_range(0, V, BV):
        d_output = _tile(d_out, first, length, head, v0, H, V, BV, DESCRIBED)
        writes = _tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
        wrong = _tile(d_wrong, first, length, head, v0, H, V, BV, DESCRIBED)
        d_reads = tl.dot(d_output, tl.trans(writes), d_reads, input_precision=PRECISION)
        pairs = tl.dot(wrong, tl.trans(writes), pairs, input_precision=PRECISION)
        values = _tile(v, first, length, head, v0, H, V, BV, DESCRIBED)
        d_rate += tl.sum(wrong.to(tl.float32) * values.to(tl.float32), 1)
        _store_tile(dv, first, length, head, v0, rate[:, None] * wrong.to(tl.float32), H, V, BV, DESCRIBED)
    overlaps = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k0 in range(0, K, BK):
        keys = _tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        overlaps = tl.dot(keys, tl.trans(keys), overlaps, input_precision=PRECISION)
    decays = _decays(tl.load(own))
    earlier = rows[:, None] > rows[None, :]
    pairs = tl.where(earlier, pairs * decays, 0.0)  # of overlaps, less the beta of the later token
    d_rate -= tl.sum(pairs * overlaps, 1)
    weights = _square(reads, index, DESCRIBED).to(tl.float32)
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
                d_output = _tile(d_out, first, length, head, v0, H, V, BV, DESCRIBED)
                writes = _tile(written, first, length, head, v0, H, V, BV, DESCRIBED)
                wrong = _tile(d_wrong, first, length, head, v0, H, V, BV, DESCRIBED)
            state = _state_tile(states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            d_state = _state_tile(d_states, index, k0, v0, K, V, BK, BV, DESCRIBED)
            through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
            d_query = tl.dot(d_output, tl.trans(state), d_query, input_precision=PRECISION)
            d_seen = tl.dot(wrong, tl.trans(state), d_seen, input_precision=PRECISION)
            d_key = tl.dot(writes, tl.trans(d_state), d_key, input_precision=PRECISION)
        queries = _tile(q, first, length, head, k0, H, K, BK, DESCRIBED)
        d_query *= (scale * since)[:, None]
        reading += tl.sum(queries.to(tl.float32) * d_query, 1)
        keys = _tile(k, first, length, head, k0, H, K, BK, DESCRIBED)
        d_query = tl.dot(d_products, keys, d_query, input_precision=PRECISION)
        _store_tile(dq, first, length, head, k0, d_query, H, K, BK, DESCRIBED)
        d_seen *= since[:, None]
        seen = tl.sum(keys.to(tl.float32) * d_seen, 1)
        reading -= rate * seen
        d_rate -= seen
        d_key *= until[:, None]
        writing += tl.sum(keys.to(tl.float32) * d_key, 1)
        d_key -= rate[:, None] * d_seen
        d_key = tl.dot(tl.trans(d_products), queries, d_key, input_precision=PRECISION)
        d_key = tl.dot(d_overlaps, keys, d_key, input_precision=PRECISION)
        _store_tile(dk, first, length, head, k0, d_key, H, K, BK, DESCRIBED)
    total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
    before = tl.sum(tl.where(earlier, writing[None, :], 0.0), 1)  # a token's own would hide the rest
    d_decay = total * tl.sum(through, 0) + tl.cumsum(reading, 0, reverse=True) + before
    at = (first.to(tl.int64) + rows) * H + head
    tl.store(d_log_decay + at, d_decay.to(d_log_decay.dtype.element_ty), mask=rows < length)
    tl.store(d_beta + at, d_rate.to(d_beta.dtype.element_ty), mask=rows < length)
