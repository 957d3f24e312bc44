"""The two walks of the gated delta rule over time, which carry the state, or its gradient, in registers.

Shape letters as in fused_kernels.py. All K rows of the state are carried, in blocks of BK. segment_table [S, 3]: first
token, one past the last token, first chunk.

Tuples grow by concatenation: Triton has no unpacking.
"""

import triton
import triton.language as tl

from statex.ops.gated_delta.fused_tiles import CHUNK, square, state_tile, store_state_tile, store_tile, tile


@triton.jit
def _given(
    states, index, v0,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The blocks of one state [K, V] in fp32, or zeros."""
    blocks = ()
    for k0 in tl.static_range(0, K, BK):
        block = tl.zeros((BK, BV), tl.float32)
        if GIVEN:
            block += state_tile(states, index, k0, v0, K, V, BK, BV, False)
        blocks = blocks + (block,)  # type: ignore[assignment] # noqa: RUF005
    return blocks


@triton.jit
def _keep(
    states, index, v0, blocks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    for k0 in tl.static_range(0, K, BK):
        store_state_tile(states, index, k0, v0, blocks[k0 // BK], K, V, BK, BV, DESCRIBED)


@triton.jit
def _keys_and_seen(
    k, token, length, head, states, index, v0, blocks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    READ: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of a chunk in blocks, and what they see of the state, whose blocks are stored as the keys see them."""
    keys, seen = (), tl.zeros((CHUNK, BV), tl.float32)
    for k0 in tl.static_range(0, K, BK):
        key = tile(k, token, length, head, k0, H, K, BK, READ)
        low = blocks[k0 // BK].to(key.dtype)
        store_state_tile(states, index, k0, v0, low, K, V, BK, BV, DESCRIBED)
        seen = tl.dot(key, low, seen, input_precision=PRECISION)
        keys = keys + (key,)  # type: ignore[assignment] # noqa: RUF005
    return keys, seen


@triton.jit
def _factors(own, any_token):
    """The decay since a chunk's start, that to its end, and beta, of each of its tokens."""
    since = tl.load(own + CHUNK, mask=any_token, other=0.0)
    until = tl.load(own + 2 * CHUNK, mask=any_token, other=0.0)
    rate = tl.load(own + 3 * CHUNK, mask=any_token, other=0.0)
    return since, until, rate


@triton.jit
def walk_kernel(
    k, v, inverse, factors, segment_table, first_state, states, written, last_state,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk BV columns of a segment's state over its chunks: written = inverse (beta (v - decay k S)), S = decay S +
    k^T (decay written); states [N, H, K, V] gets S at the start of each chunk."""
    head, segment = tl.program_id(1) % H, tl.program_id(1) // H
    first, end = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk, num_chunks = tl.load(segment_table + 3 * segment + 2), tl.cdiv(end - first, CHUNK)
    v0, rows, at_segment = tl.program_id(0) * BV, tl.arange(0, CHUNK), segment * H + head
    blocks = _given(first_state, at_segment, v0, K, V, BK, BV, HAS_FIRST)
    # The factors are loaded a step ahead by hand: the pipeliner does not see them
    any_token = rows < tl.where(num_chunks > 0, CHUNK, 0)
    own = factors + (first_chunk * H + head).to(tl.int64) * 4 * CHUNK + rows
    since, until, rate = _factors(own, any_token)
    for n in range(num_chunks):
        token, index = first + n * CHUNK, (first_chunk + n) * H + head
        length = end - token
        own += tl.where(n + 1 < num_chunks, H * 4 * CHUNK, 0)
        next_since, next_until, next_rate = _factors(own, any_token)
        values = tile(v, token, length, head, v0, H, V, BV, DESCRIBED)
        solve = square(inverse, index, DESCRIBED)
        keys, seen = _keys_and_seen(
            k, token, length, head, states, index, v0, blocks, H, K, V, BK, BV, DESCRIBED, DESCRIBED, PRECISION
        )
        wrong = rate[:, None] * (values.to(tl.float32) - since[:, None] * seen)
        write = tl.dot(solve, wrong.to(values.dtype), input_precision=PRECISION)
        store_tile(written, token, length, head, v0, write, H, V, BV, DESCRIBED)
        total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
        late = (until[:, None] * write).to(values.dtype)
        later = ()
        for j in tl.static_range((K + BK - 1) // BK):
            block = tl.dot(tl.trans(keys[j]), late, blocks[j] * total, input_precision=PRECISION)
            later = later + (block,)  # type: ignore[assignment] # noqa: RUF005
        blocks = later
        since, until, rate = next_since, next_until, next_rate
    if HAS_LAST:
        _keep(last_state, at_segment, v0, blocks, K, V, BK, BV, False)


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

    Two stages of all keys and queries of more than two blocks are more than there is shared memory. Then the keys are
    read a second time, and by pointers: a descriptor's tile is waited for at once where nothing is pipelined.
    """
    head, segment = tl.program_id(1) % H, tl.program_id(1) // H
    first, end = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk, num_chunks = tl.load(segment_table + 3 * segment + 2), tl.cdiv(end - first, CHUNK)
    v0, rows, at_segment = tl.program_id(0) * BV, tl.arange(0, CHUNK), segment * H + head
    FEW: tl.constexpr = K <= 2 * BK
    READ: tl.constexpr = DESCRIBED and FEW
    blocks = _given(d_last_state, at_segment, v0, K, V, BK, BV, HAS_LAST)
    any_token = rows < tl.where(num_chunks > 0, CHUNK, 0)
    own = factors + ((first_chunk + tl.maximum(num_chunks - 1, 0)) * H + head).to(tl.int64) * 4 * CHUNK + rows
    since, until, rate = _factors(own, any_token)
    for step in range(num_chunks):
        n = num_chunks - 1 - step
        token, index = first + n * CHUNK, (first_chunk + n) * H + head
        length = end - token
        own -= tl.where(n > 0, H * 4 * CHUNK, 0)
        next_since, next_until, next_rate = _factors(own, any_token)
        d_output = tile(d_out, token, length, head, v0, H, V, BV, READ)
        solve, weights = square(inverse, index, READ), square(reads, index, READ)
        keys, seen = _keys_and_seen(
            k, token, length, head, d_states, index, v0, blocks, H, K, V, BK, BV, READ, DESCRIBED, PRECISION
        )
        d_write = tl.dot(tl.trans(weights), d_output, until[:, None] * seen, input_precision=PRECISION)
        wrong = tl.dot(tl.trans(solve), d_write.to(d_output.dtype), input_precision=PRECISION)
        store_tile(d_wrong, token, length, head, v0, wrong, H, V, BV, DESCRIBED)
        total = tl.sum(tl.where(rows == CHUNK - 1, since, 0.0), 0)
        read = ((scale * since)[:, None] * d_output.to(tl.float32)).to(d_output.dtype)
        removed = (-(rate * since)[:, None] * wrong).to(d_output.dtype)
        earlier = ()
        for k0 in tl.static_range(0, K, BK):
            queries = tile(q, token, length, head, k0, H, K, BK, READ)
            block = tl.dot(tl.trans(queries), read, blocks[k0 // BK] * total, input_precision=PRECISION)
            key = keys[k0 // BK]
            if not FEW:
                key = tile(k, token, length, head, k0, H, K, BK, READ)
            block = tl.dot(tl.trans(key), removed, block, input_precision=PRECISION)
            earlier = earlier + (block,)  # type: ignore[assignment] # noqa: RUF005
        blocks = earlier
        since, until, rate = next_since, next_until, next_rate
    if HAS_FIRST:
        _keep(d_first_state, at_segment, v0, blocks, K, V, BK, BV, False)
