"""Triton kernels of gated linear attention for large states; docs/kernels.md describes the algorithm.

Shape letters: T time, H heads, K key dim, V value dim, C tokens a chunk (a state is kept for each), N chunks of
all segments together, S segments; a block is 64 tokens. Tensors of the caller are [T, H, K or V] (batch and
segments laid out one after the other); tensors marked "padded" are [N * C, H, ...], each segment padded with
zeros to whole chunks. Decays are in natural logarithms.

chunk_table [N, 2]: first token of the chunk, number of tokens. segment_table [S, 3]: first token, one past the
last token, first chunk.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)


LEVELS = tl.constexpr(6)  # the blocks merged inside a block have 1, 2, 4, ..., 32 tokens
TO_END = tl.constexpr(6)
FROM_START = tl.constexpr(7)


@triton.jit
def _split(x, EXACT: tl.constexpr):
    """x as high + low, so that two bf16 products give its sums to 16 bits; (x, x) for fp32 products."""
    high, low = x, x
    if not EXACT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _sums(windows, index, high, low, rows, EXACT: tl.constexpr):
    """Sums of x = high + low over a window of tokens for each token of a block: [64, BK] fp32.

    The windows are 0/1 matrices [8, 64, 64]. Window `level` (blocks of 2**level tokens, taken in pairs): for a token
    of the later block those from the block's start to the token; of the earlier block, those after the token.
    TO_END: the tokens after it; FROM_START: those up to it.
    """
    window = tl.load(windows + index * (BLOCK * BLOCK) + rows[:, None] * BLOCK + rows[None, :])
    if EXACT:
        result = tl.dot(window, high, input_precision="tf32x3")
    else:
        result = tl.dot(window, low)
        result = tl.dot(window, high, result)
    return result


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def prepare_kernel(
    q, k, log_decay, chunk_table, windows, q_decayed, k_decayed, block_decay, own,
    scale, NUM_CHUNKS,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BK key channels of one block: scaled q decayed from the block's start, k decayed to its end (both padded), the
    block's total decay [N * C / 64, H, K], and each token's own scaled q k [K / BK, N * C, H]."""
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunk = block // (C // BLOCK)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols = tl.arange(0, BLOCK), tile * BK + tl.arange(0, BK)
    in_chunk = (block % (C // BLOCK)) * BLOCK + rows
    inside = (cols < K)[None, :]
    mask = (in_chunk < length)[:, None] & inside
    token = (start.to(tl.int64) * H + head) * K
    padded = (chunk.to(tl.int64) * C * H + head) * K
    at = (in_chunk * (H * K))[:, None] + cols[None, :]
    decay = tl.load(log_decay + token + at, mask=mask, other=0.0).to(tl.float32)
    queries = tl.load(q + token + at, mask=mask, other=0.0)
    keys = tl.load(k + token + at, mask=mask, other=0.0)
    tl.store(block_decay + (block * H + head).to(tl.int64) * K + cols, tl.sum(decay, 0), mask=cols < K)
    product = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1) * scale
    tl.store(own + ((tile * NUM_CHUNKS + chunk).to(tl.int64) * C + in_chunk) * H + head, product)
    high, low = _split(decay, EXACT)
    q_out = queries.to(tl.float32) * scale * tl.exp(_sums(windows, FROM_START, high, low, rows, EXACT))
    tl.store(q_decayed + padded + at, q_out.to(queries.dtype), mask=inside)
    k_out = keys.to(tl.float32) * tl.exp(_sums(windows, TO_END, high, low, rows, EXACT))
    tl.store(k_decayed + padded + at, k_out.to(keys.dtype), mask=inside)


@triton.jit
def prefix_kernel(
    block_decay, before, after, strong,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Decay of the blocks of the same chunk before and after each block [N * C / 64, H, K]; and whether a block of
    the chunk decays by more than exp(-LIMIT) in some channel [N, H]."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = C // 64
    largest = tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        at = (chunk * blocks * H + head).to(tl.int64) * K + cols
        total = tl.zeros((BK,), tl.float32)
        for i in range(blocks):
            tl.store(before + at + i * H * K, total, mask=cols < K)
            decay = tl.load(block_decay + at + i * H * K, mask=cols < K, other=0.0)
            total += decay
            largest = tl.maximum(largest, tl.where(decay >= -LIMIT, 0.0, 1.0))  # also for NaN
        total = tl.zeros((BK,), tl.float32)
        for j in range(blocks):
            i = blocks - 1 - j
            tl.store(after + at + i * H * K, total, mask=cols < K)
            total += tl.load(block_decay + at + i * H * K, mask=cols < K, other=0.0)
    tl.store(strong + chunk * H + head, tl.max(largest, 0).to(tl.int32))


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def attention_kernel(
    q_decayed, k_decayed, before, block_decay, own, strong, attention,
    NUM_CHUNKS,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, TILES_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one block to itself or to an earlier block of its chunk (padded [N * C, H, C]), zeros for the
    mirrored pair. To itself only where no decay is strong: there the decay between two tokens is taken as that from
    the block's start, times that to its end, over that of the whole block.

    The product is computed transposed: an operand that is computed goes second, since the tensor cores read the
    second from shared memory and ptxas of CUDA 12 overwrites first operands in registers before they are read.
    """
    blocks: tl.constexpr = C // 64
    pairs: tl.constexpr = blocks * (blocks + 1) // 2
    chunk, head = tl.program_id(0) // pairs, tl.program_id(1)
    pair = tl.program_id(0) % pairs
    i = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32) + (pair >= 6).to(tl.int32)  # (0, 0), (1, 0), (1, 1), ...
    j = pair - i * (i + 1) // 2
    if (i == j) & (tl.load(strong + chunk * H + head) != 0):
        return
    rows = tl.arange(0, BLOCK)
    to_row, from_row = chunk * C + rows + i * BLOCK, chunk * C + rows + j * BLOCK
    to_at, from_at = (to_row.to(tl.int64) * H + head)[:, None], (from_row.to(tl.int64) * H + head)[:, None]
    table = (chunk * blocks * H + head).to(tl.int64) * K
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        inside = (cols < K)[None, :]
        queries = tl.load(q_decayed + to_at * K + cols[None, :], mask=inside, other=0.0)
        keys = tl.load(k_decayed + from_at * K + cols[None, :], mask=inside, other=0.0)
        decay = tl.load(before + table + i * H * K + cols, mask=cols < K, other=0.0)
        decay -= tl.load(before + table + j * H * K + cols, mask=cols < K, other=0.0)
        decay -= tl.load(block_decay + table + j * H * K + cols, mask=cols < K, other=0.0)
        queries = (queries.to(tl.float32) * tl.exp(decay)[None, :]).to(keys.dtype)
        result = tl.dot(keys, tl.trans(queries), result, input_precision=PRECISION)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.static_range(TILES_K):
        diagonal += tl.load(own + (tile * NUM_CHUNKS * C + to_row).to(tl.int64) * H + head)
    result = tl.where((i == j) & (rows[:, None] == rows[None, :]), diagonal[None, :], result)
    result = tl.where((i > j) | (rows[:, None] <= rows[None, :]), result, 0.0)
    to_column = (to_row.to(tl.int64) * H + head)[None, :]
    tl.store(attention + to_column * C + (rows + j * BLOCK)[:, None], result.to(attention.dtype.element_ty))
    if i > j:
        zeros = tl.zeros((BLOCK, BLOCK), attention.dtype.element_ty)
        tl.store(attention + from_at * C + (rows + i * BLOCK)[None, :], zeros)


@triton.jit
def strong_attention_kernel(
    q, k, log_decay, chunk_table, windows, strong, attention,
    scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attention of one block to itself where a decay is strong: neighbouring blocks of 1, 2, 4, ..., 32 tokens are
    merged in pairs, with decays from the later block's start and to the earlier one's end, so that no exponent is
    positive."""
    block, head = tl.program_id(0), tl.program_id(1)
    chunk = block // (C // BLOCK)
    if tl.load(strong + chunk * H + head) == 0:
        return
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, BLOCK)
    in_chunk = (block % (C // BLOCK)) * BLOCK + rows
    token = (start.to(tl.int64) * H + head) * K
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        mask = (in_chunk < length)[:, None] & (cols < K)[None, :]
        at = (in_chunk * (H * K))[:, None] + cols[None, :]
        queries = tl.load(q + token + at, mask=mask, other=0.0)
        keys = tl.load(k + token + at, mask=mask, other=0.0)
        high, low = _split(tl.load(log_decay + token + at, mask=mask, other=0.0).to(tl.float32), EXACT)
        diagonal += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        for level in range(LEVELS):
            later = (((rows >> level) & 1) != 0)[:, None]
            factor = tl.exp(_sums(windows, level, high, low, rows, EXACT))
            both = tl.where(later, queries.to(tl.float32) * factor, keys.to(tl.float32) * factor).to(queries.dtype)
            product = tl.dot(both, tl.trans(both), input_precision=PRECISION)  # symmetric
            result += tl.where((rows[:, None] ^ rows[None, :]) >> level == 1, product, 0.0)
    result = tl.where(rows[:, None] > rows[None, :], result, 0.0)
    result = (result + tl.where(rows[:, None] == rows[None, :], diagonal[:, None], 0.0)) * scale
    at = (chunk.to(tl.int64) * C * H + head) * C + (in_chunk * (H * C))[:, None] + in_chunk[None, :]
    tl.store(attention + at, result.to(attention.dtype.element_ty))


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def state_kernel(
    x, y, block_decay, segment_table, first, states, last, other_states, overlap,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one [BK, BV] tile of a segment's state over time, keeping it in registers.

    Forward: x is k_decayed and y is v; states gets the state at the start of each chunk [N, H, K, V].
    Reverse: x is q_decayed and y the gradient of the output; states gets the gradient of the state at the end of
    each chunk, and overlap [V / BV, N, H, K] that gradient times the state at the chunk's start (other_states),
    summed over the value channels.
    """
    tile_k, tile_v = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    segment, head = tl.program_id(1) // H, tl.program_id(1) % H
    first_token, end_token = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk = tl.load(segment_table + 3 * segment + 2)
    blocks: tl.constexpr = C // 64
    num_chunks = (end_token - first_token + C - 1) // C
    num_blocks = num_chunks * blocks
    rows, cols_k, cols_v = tl.arange(0, BLOCK), tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    inside = (cols_k < K)[:, None] & (cols_v < V)[None, :]
    in_state = cols_k[:, None] * V + cols_v[None, :]
    segment_state = (segment * H + head).to(tl.int64) * K * V + in_state
    state = tl.zeros((BK, BV), tl.float32)
    if HAS_FIRST:
        state += tl.load(first + segment_state, mask=inside, other=0.0).to(tl.float32)
    decays = block_decay + (first_chunk * blocks * H + head).to(tl.int64) * K + cols_k
    decay = tl.load(
        decays + tl.where(REVERSE, num_blocks - 1, 0) * (H * K), mask=(cols_k < K) & (num_blocks > 0), other=0.0
    )
    for step in range(num_blocks):
        block = num_blocks - 1 - step if REVERSE else step
        chunk = first_chunk + block // blocks
        if step % blocks == 0:
            at = (chunk * H + head).to(tl.int64) * K * V + in_state
            tl.store(states + at, state.to(states.dtype.element_ty), mask=inside)
            if REVERSE:
                other = tl.load(other_states + at, mask=inside, other=0.0).to(tl.float32)
                at = ((tile_v * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * K + cols_k
                tl.store(overlap + at, tl.sum(other * state, 1), mask=cols_k < K)
        padded = (first_chunk * C + block * BLOCK + rows).to(tl.int64)
        at = ((padded * H + head) * K)[None, :] + cols_k[:, None]
        x_tile = tl.load(x + at, mask=(cols_k < K)[:, None], other=0.0)
        token = first_token + block * BLOCK + rows
        at = ((token.to(tl.int64) * H + head) * V)[:, None] + cols_v[None, :]
        y_tile = tl.load(y + at, mask=(token < end_token)[:, None] & (cols_v < V)[None, :], other=0.0)
        factor = tl.exp(decay)  # loaded one step ahead: the pipeliner does not see it
        ahead = tl.maximum(block - 1, 0) if REVERSE else tl.minimum(block + 1, num_blocks - 1)
        decay = tl.load(decays + ahead.to(tl.int64) * (H * K), mask=cols_k < K, other=0.0)
        state = tl.dot(x_tile, y_tile, state * factor[:, None], input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + segment_state, state, mask=inside)


@triton.jit
def rebase_kernel(
    x, decay_table, out,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (padded) of one block, decayed further by the block's entry in the table: from the chunk's start, or to its
    end."""
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, cols = tl.arange(0, BLOCK), tile * BK + tl.arange(0, BK)
    inside = (cols < K)[None, :]
    factor = tl.exp(tl.load(decay_table + (block * H + head).to(tl.int64) * K + cols, mask=cols < K, other=0.0))
    at = (block.to(tl.int64) * BLOCK * H + head) * K + (rows * (H * K))[:, None] + cols[None, :]
    tile_in = tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + at, (tile_in.to(tl.float32) * factor[None, :]).to(tile_in.dtype), mask=inside)


@triton.jit
def output_kernel(
    x, states, attention, y, out, chunk_table,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x times the chunk's state, plus attention times y, for BM tokens of one chunk.

    The output from q decayed from the chunk's start, v and the states; or, TRANSPOSED, the gradient of v from k
    decayed to the chunk's end, the gradient of the output and the gradients of the states.
    """
    tile_v, head = tl.program_id(0), tl.program_id(2)
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols_v = tl.arange(0, BM), tile_v * BV + tl.arange(0, BV)
    in_chunk = part * BM + rows
    result = tl.zeros((BM, BV), tl.float32)
    x_row = (((chunk * C + in_chunk).to(tl.int64) * H + head) * K)[:, None]
    state = states + (chunk * H + head).to(tl.int64) * K * V
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        x_tile = tl.load(x + x_row + cols[None, :], mask=(cols < K)[None, :], other=0.0)
        inside = (cols < K)[:, None] & (cols_v < V)[None, :]
        state_tile = tl.load(state + cols[:, None] * V + cols_v[None, :], mask=inside, other=0.0)
        result = tl.dot(x_tile, state_tile, result, input_precision=PRECISION)
    first = part * BM if TRANSPOSED else 0
    last = C if TRANSPOSED else (part + 1) * BM
    for n0 in range(first, last, BN):
        other = n0 + tl.arange(0, BN)
        if TRANSPOSED:
            at = (((chunk * C + other).to(tl.int64) * H + head) * C)[None, :] + in_chunk[:, None]
        else:
            at = (((chunk * C + in_chunk).to(tl.int64) * H + head) * C)[:, None] + other[None, :]
        weights = tl.load(attention + at)
        token = (start + other).to(tl.int64)
        at = ((token * H + head) * V)[:, None] + cols_v[None, :]
        y_tile = tl.load(y + at, mask=(other < length)[:, None] & (cols_v < V)[None, :], other=0.0)
        result = tl.dot(weights, y_tile, result, input_precision=PRECISION)
    token = (start + in_chunk).to(tl.int64)
    at = ((token * H + head) * V)[:, None] + cols_v[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(in_chunk < length)[:, None] & (cols_v < V)[None, :])


@triton.jit
def attention_gradient_kernel(
    d_out, v, d_attention, chunk_table,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_out v^T for BM x BM tokens of one chunk, on and below the diagonal; zero above it (padded [N * C, H, C])."""
    parts: tl.constexpr = C // BM
    pairs: tl.constexpr = parts * (parts + 1) // 2
    chunk, head = tl.program_id(0) // pairs, tl.program_id(1)
    pair = tl.program_id(0) % pairs
    i = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32) + (pair >= 6).to(tl.int32)  # (0, 0), (1, 0), (1, 1), ...
    j = pair - i * (i + 1) // 2
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    to_row, from_row = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    result = tl.zeros((BM, BM), tl.float32)
    for v0 in range(0, V, BV):
        cols = v0 + tl.arange(0, BV)
        at = (((start + to_row).to(tl.int64) * H + head) * V)[:, None] + cols[None, :]
        gradient = tl.load(d_out + at, mask=(to_row < length)[:, None] & (cols < V)[None, :], other=0.0)
        at = (((start + from_row).to(tl.int64) * H + head) * V)[:, None] + cols[None, :]
        values = tl.load(v + at, mask=(from_row < length)[:, None] & (cols < V)[None, :], other=0.0)
        result = tl.dot(gradient, tl.trans(values), result, input_precision=PRECISION)
    result = tl.where(to_row[:, None] >= from_row[None, :], result, 0.0)
    at = (((chunk * C + to_row).to(tl.int64) * H + head) * C)[:, None] + from_row[None, :]
    tl.store(d_attention + at, result.to(d_attention.dtype.element_ty))


@triton.jit
def through_state_kernel(
    y, states, out, chunk_table,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y states^T for BM tokens of one chunk, padded [N * C, H, K]: the gradients of q and k through the state,
    decays not yet applied."""
    tile_k, head = tl.program_id(0), tl.program_id(2)
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    in_chunk, cols_k = part * BM + tl.arange(0, BM), tile_k * BK + tl.arange(0, BK)
    y_row = (((start + in_chunk).to(tl.int64) * H + head) * V)[:, None]
    state = states + (chunk * H + head).to(tl.int64) * K * V
    result = tl.zeros((BM, BK), tl.float32)
    for v0 in range(0, V, BV):
        cols = v0 + tl.arange(0, BV)
        y_tile = tl.load(y + y_row + cols[None, :], mask=(in_chunk < length)[:, None] & (cols < V)[None, :], other=0.0)
        inside = (cols_k < K)[None, :] & (cols < V)[:, None]
        state_tile = tl.load(state + cols_k[None, :] * V + cols[:, None], mask=inside, other=0.0)
        result = tl.dot(y_tile, state_tile, result, input_precision=PRECISION)
    at = (((chunk * C + in_chunk).to(tl.int64) * H + head) * K)[:, None] + cols_k[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(cols_k < K)[None, :])


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def inside_gradient_kernel(
    q, k, log_decay, q_decayed, k_decayed, d_attention, dq_state, dk_state, overlap,
    before, after, block_decay, strong, chunk_table, windows, dq, dk, d_log_decay,
    scale, NUM_CHUNKS,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, TILES_V: tl.constexpr,
    STRONG: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and log_decay for one chunk and BK key channels, its blocks from last to first; for the
    chunks with a strong decay, or for those without.

    The gradient of a log decay is the sum of q k dA over all pairs (source, reader) around its token; going back
    over a token changes that sum by `change` = q dq - k dk. Both sides of a pair use the same rounded factors, so
    that pairs which have ended cancel; STRONG leaves out the token's own pair, which would hide the rest.
    """
    tile, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (tl.load(strong + chunk * H + head) != 0) != STRONG:
        return
    blocks: tl.constexpr = C // 64
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols = tl.arange(0, BLOCK), tile * BK + tl.arange(0, BK)
    inside = (cols < K)[None, :]
    table = (chunk * blocks * H + head).to(tl.int64) * K + cols
    token = (start.to(tl.int64) * H + head) * K
    padded = (chunk.to(tl.int64) * C * H + head) * K
    pairs = d_attention + (chunk.to(tl.int64) * C * H + head) * C
    # Pairs around the end of the chunk: from before it through it, and from inside it.
    crossing = tl.zeros((BK,), tl.float32)
    for tile_v in tl.static_range(TILES_V):
        at = ((tile_v * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * K + cols
        crossing += tl.load(overlap + at, mask=cols < K, other=0.0)
    decay = tl.load(before + table + (blocks - 1) * H * K, mask=cols < K, other=0.0)
    decay += tl.load(block_decay + table + (blocks - 1) * H * K, mask=cols < K, other=0.0)
    crossing *= tl.exp(decay)
    for part in tl.static_range(blocks):
        at = ((rows + part * BLOCK) * (H * K))[:, None] + cols[None, :]
        sources = tl.load(k_decayed + padded + at, mask=inside, other=0.0).to(tl.float32)
        sources *= tl.load(dk_state + padded + at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(after + table + part * H * K, mask=cols < K, other=0.0)
        crossing += tl.sum(sources, 0) * tl.exp(decay)
    for step in range(blocks):
        i = blocks - 1 - step
        in_chunk = rows + i * BLOCK
        at = (in_chunk * (H * K))[:, None] + cols[None, :]
        before_i = tl.load(before + table + i * H * K, mask=cols < K, other=0.0)
        through_i = before_i + tl.load(block_decay + table + i * H * K, mask=cols < K, other=0.0)
        after_i = tl.load(after + table + i * H * K, mask=cols < K, other=0.0)
        dq_tile = tl.load(dq_state + padded + at, mask=inside, other=0.0).to(tl.float32) * tl.exp(before_i)[None, :]
        dk_tile = tl.load(dk_state + padded + at, mask=inside, other=0.0).to(tl.float32) * tl.exp(after_i)[None, :]
        for j in range(0, i if STRONG else i + 1):
            decay = before_i - tl.load(before + table + j * H * K, mask=cols < K, other=0.0)
            decay -= tl.load(block_decay + table + j * H * K, mask=cols < K, other=0.0)
            other = rows + j * BLOCK
            weights = tl.load(pairs + (in_chunk * (H * C))[:, None] + other[None, :])
            at_other = (other * (H * K))[:, None] + cols[None, :]
            other_keys = tl.load(k_decayed + padded + at_other, mask=inside, other=0.0)
            product = tl.dot(weights, other_keys, input_precision=PRECISION)
            dq_tile += product * tl.exp(decay)[None, :]
        for j in range(i + 1 if STRONG else i, blocks):
            decay = tl.load(before + table + j * H * K, mask=cols < K, other=0.0) - through_i
            other = rows + j * BLOCK
            weights = tl.load(pairs + (other * (H * C))[None, :] + in_chunk[:, None])
            at_other = (other * (H * K))[:, None] + cols[None, :]
            other_queries = tl.load(q_decayed + padded + at_other, mask=inside, other=0.0)
            product = tl.dot(weights, other_queries, input_precision=PRECISION)
            dk_tile += product * tl.exp(decay)[None, :]
        change = tl.load(q_decayed + padded + at, mask=inside, other=0.0).to(tl.float32) * dq_tile
        change -= tl.load(k_decayed + padded + at, mask=inside, other=0.0).to(tl.float32) * dk_tile
        mask = (in_chunk < length)[:, None] & inside
        high, low = _split(tl.load(log_decay + token + at, mask=mask, other=0.0).to(tl.float32), EXACT)
        dq_tile *= tl.exp(_sums(windows, FROM_START, high, low, rows, EXACT))
        dk_tile *= tl.exp(_sums(windows, TO_END, high, low, rows, EXACT))
        if STRONG:
            queries = tl.load(q + token + at, mask=mask, other=0.0)
            keys = tl.load(k + token + at, mask=mask, other=0.0)
            weights = tl.load(pairs + (in_chunk * (H * C))[:, None] + in_chunk[None, :])
            mirrored = tl.load(pairs + (in_chunk * (H * C))[None, :] + in_chunk[:, None])
            own = tl.sum(tl.where(rows[:, None] == rows[None, :], weights.to(tl.float32), 0.0), 1)[:, None]
            weights += mirrored  # symmetric: a pair of blocks gives both the later's dq and the earlier's dk
            for level in range(LEVELS):
                later = (((rows >> level) & 1) != 0)[:, None]
                factor = tl.exp(_sums(windows, level, high, low, rows, EXACT))
                both = tl.where(later, queries.to(tl.float32) * factor, keys.to(tl.float32) * factor).to(queries.dtype)
                picked = tl.where((rows[:, None] ^ rows[None, :]) >> level == 1, weights, 0.0).to(queries.dtype)
                product = tl.dot(picked, both, input_precision=PRECISION)
                change += tl.where(later, scale, -scale) * product * both.to(tl.float32)
                product *= factor
                dq_tile += tl.where(later, product, 0.0)
                dk_tile += tl.where(later, 0.0, product * scale)
            dq_tile += own * keys.to(tl.float32)
            dk_tile += own * scale * queries.to(tl.float32)
        tl.store(dq + token + at, (dq_tile * scale).to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + token + at, dk_tile.to(dk.dtype.element_ty), mask=mask)
        high, low = _split(change, EXACT)
        d_decay = crossing[None, :] + change + _sums(windows, TO_END, high, low, rows, EXACT)
        crossing += tl.sum(change, 0)
        tl.store(d_log_decay + token + at, d_decay.to(d_log_decay.dtype.element_ty), mask=mask)
