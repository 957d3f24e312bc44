"""Triton kernels of gated linear attention for large states; docs/kernels.md describes the algorithm.

Shape letters: T time, H heads, K key dim, V value dim, C tokens per chunk (a state is kept for each), N chunks of
all segments together, S segments; a block is 64 tokens. Tensors of the caller are [T, H, K or V] (batch and
segments laid out one after the other); tensors marked "padded" are [N * C, H, ...], each segment padded with
zeros to whole chunks. Decays are in natural logarithms.

chunk_table [N, 2]: first token of the chunk, number of tokens.
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
def _window(windows, index, rows):
    """Which tokens of a block are summed for each of its tokens, 0/1 [64, 64], out of windows [8, 64, 64].

    Window `level` (blocks of 2**level tokens, taken in pairs): for a token of the later block those from the block's
    start to the token; of the earlier block, those after the token. TO_END: the tokens after it; FROM_START: those up
    to it.
    """
    return tl.load(windows + index * (BLOCK * BLOCK) + rows[:, None] * BLOCK + rows[None, :])


@triton.jit
def _sums(window, high, low, EXACT: tl.constexpr):
    """Sums of x = high + low over the window of each token of a block: [64, BK] fp32."""
    if EXACT:
        result = tl.dot(window, high, input_precision="tf32x3")
    else:
        result = tl.dot(window, low)
        result = tl.dot(window, high, result)
    return result


@triton.jit
def prepare_kernel(
    q, k, log_decay, chunk_table, windows, q_decayed, k_decayed, q_rest, k_rest, block_decay, attention, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One block: scaled q decayed from its start, k decayed to its end (both padded), what rounding took away from
    them (q_rest, k_rest, unless None), its total decay [N * C / 64, H, K], and its attention to itself (padded [N * C,
    H, C]), from q and k before they are rounded.

    There the decay between two tokens is taken as that to the block's end from the first, over that from the second:
    right where no decay is strong; elsewhere strong_attention_kernel comes after.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    chunk = block // (C // BLOCK)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, BLOCK)
    in_chunk = (block % (C // BLOCK)) * BLOCK + rows
    token = (start.to(tl.int64) * H + head) * K
    padded = (chunk.to(tl.int64) * C * H + head) * K
    from_start, after = _window(windows, FROM_START, rows), _window(windows, TO_END, rows)
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        inside = (cols < K)[None, :]
        mask = (in_chunk < length)[:, None] & inside
        at = (in_chunk * (H * K))[:, None] + cols[None, :]
        decay = tl.load(log_decay + token + at, mask=mask, other=0.0).to(tl.float32)
        queries = tl.load(q + token + at, mask=mask, other=0.0)
        keys = tl.load(k + token + at, mask=mask, other=0.0)
        tl.store(block_decay + (block * H + head).to(tl.int64) * K + cols, tl.sum(decay, 0), mask=cols < K)
        high, low = _split(decay, EXACT)
        to_end = _sums(after, high, low, EXACT)
        scaled = queries.to(tl.float32) * scale
        q_out = scaled * tl.exp(_sums(from_start, high, low, EXACT))
        high, low = _split(q_out, EXACT)
        tl.store(q_decayed + padded + at, high, mask=inside)
        if q_rest is not None:
            tl.store(q_rest + padded + at, low, mask=inside)
        k_out = keys.to(tl.float32) * tl.exp(to_end)
        high, low = _split(k_out, EXACT)
        tl.store(k_decayed + padded + at, high, mask=inside)
        if k_rest is not None:
            tl.store(k_rest + padded + at, low, mask=inside)
        result = tl.dot(k_out, tl.trans(scaled * tl.exp(-to_end)), result, input_precision=PRECISION)
    result = tl.where(rows[:, None] <= rows[None, :], result, 0.0)
    at = (chunk.to(tl.int64) * C * H + head) * C + (in_chunk * (H * C))[None, :] + in_chunk[:, None]
    tl.store(attention + at, result.to(attention.dtype.element_ty))


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


@triton.jit
def attention_kernel(
    q_decayed, k_decayed, before, block_decay, attention,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one block to an earlier block of its chunk (padded [N * C, H, C]), zeros for the mirrored pair.

    The product is computed transposed: an operand that is computed goes second, since the tensor cores read the
    second from shared memory and ptxas of CUDA 12 overwrites first operands in registers before they are read.
    """
    blocks: tl.constexpr = C // 64
    pairs: tl.constexpr = blocks * (blocks - 1) // 2
    chunk, head = tl.program_id(0) // pairs, tl.program_id(1)
    pair = tl.program_id(0) % pairs
    i = 1 + (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32)  # (1, 0), (2, 0), (2, 1), (3, 0), ...
    j = pair - i * (i - 1) // 2
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
    to_column = (to_row.to(tl.int64) * H + head)[None, :]
    tl.store(attention + to_column * C + (rows + j * BLOCK)[:, None], result.to(attention.dtype.element_ty))
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
            factor = tl.exp(_sums(_window(windows, level, rows), high, low, EXACT))
            both = tl.where(later, queries.to(tl.float32) * factor, keys.to(tl.float32) * factor).to(queries.dtype)
            product = tl.dot(both, tl.trans(both), input_precision=PRECISION)  # symmetric
            result += tl.where((rows[:, None] ^ rows[None, :]) >> level == 1, product, 0.0)
    result = tl.where(rows[:, None] > rows[None, :], result, 0.0)
    result = (result + tl.where(rows[:, None] == rows[None, :], diagonal[:, None], 0.0)) * scale
    at = (chunk.to(tl.int64) * C * H + head) * C + (in_chunk * (H * C))[:, None] + in_chunk[None, :]
    tl.store(attention + at, result.to(attention.dtype.element_ty))


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
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x times the chunk's state, plus attention times y, for BM tokens of one chunk.

    The output from q decayed from the chunk's start, v and the states; or, TRANSPOSED, the gradient of v from k
    decayed to the chunk's end, the gradient of the output and the gradients of the states.

    DESCRIBED: x and states are descriptors, of [BM, BK] and [BK, BV].
    """
    tile_v, head = tl.program_id(0), tl.program_id(2)
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols_v = tl.arange(0, BM), tile_v * BV + tl.arange(0, BV)
    in_chunk = part * BM + rows
    result = tl.zeros((BM, BV), tl.float32)
    for k0 in range(0, K, BK):
        if DESCRIBED:
            x_tile = x.load([chunk * C + part * BM, head * K + k0])
            state_tile = states.load([(chunk * H + head) * K + k0, tile_v * BV])
        else:
            cols = k0 + tl.arange(0, BK)
            at = (((chunk * C + in_chunk).to(tl.int64) * H + head) * K)[:, None] + cols[None, :]
            x_tile = tl.load(x + at, mask=(cols < K)[None, :], other=0.0)
            at = ((chunk * H + head).to(tl.int64) * K + cols)[:, None] * V + cols_v[None, :]
            state_tile = tl.load(states + at, mask=(cols < K)[:, None] & (cols_v < V)[None, :], other=0.0)
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
    d_out, v, d_attention, remainder, chunk_table,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_out v^T for BM x BM tokens of one chunk, on and below the diagonal; zero above it (padded [N * C, H, C]). And,
    not EXACT, what rounding took away inside each block (remainder, padded [N * C, H, 64])."""
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
    rounded = result.to(d_attention.dtype.element_ty)
    tl.store(d_attention + at, rounded)
    if not EXACT:
        same_block = (to_row // BLOCK)[:, None] == (from_row // BLOCK)[None, :]
        at = (((chunk * C + to_row).to(tl.int64) * H + head) * BLOCK)[:, None] + (from_row % BLOCK)[None, :]
        tl.store(remainder + at, (result - rounded.to(tl.float32)).to(rounded.dtype), mask=same_block)


@triton.jit
def key_gradient_kernel(
    y, states, d_attention, remainder, other, other_rest, own, own_rest, block_decay, strong, chunk_table, out, sources,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr, EXACT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q for one block, padded [N * C, H, K] fp32, still to be decayed from its start: y = the gradient of
    the output, other = k_decayed.

    TRANSPOSED: of k, still to be decayed to the end of its block: y = v, with the gradients of the states, other =
    q_decayed; and own = k_decayed times the part through the states, summed over the block: sources [N * C / 64, H,
    K], decayed to the chunk's end. Not EXACT, other and own come with their rest.

    From the chunk's far end the gradient is decayed over one block after the other, while the block's own part is
    added. Where a decay is strong, attention of a block to itself is left to inside_gradient_kernel. DESCRIBED: y and
    states are descriptors, of [64, BV] and [BK, BV].
    """
    tile_k, head = tl.program_id(0), tl.program_id(2)
    chunk, block = tl.program_id(1) // (C // BLOCK), tl.program_id(1) % (C // BLOCK)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    blocks: tl.constexpr = C // 64
    tokens, cols_k = tl.arange(0, BLOCK), tile_k * BK + tl.arange(0, BK)
    in_chunk, inside_k = block * BLOCK + tokens, (cols_k < K)[None, :]
    padded = (chunk.to(tl.int64) * C * H + head) * K
    at_own = padded + (in_chunk * (H * K))[:, None] + cols_k[None, :]
    at_block = (chunk * blocks * H + head).to(tl.int64) * K + cols_k
    if TRANSPOSED:
        own_tile = tl.load(own + at_own, mask=inside_k, other=0.0).to(tl.float32)
        if not EXACT:
            own_tile += tl.load(own_rest + at_own, mask=inside_k, other=0.0).to(tl.float32)
    is_strong = tl.load(strong + chunk * H + head) != 0
    num_far = blocks - 1 - block if TRANSPOSED else block
    farthest = blocks - 1 if TRANSPOSED else 0
    factor = tl.exp(tl.load(block_decay + at_block + farthest * H * K, mask=cols_k < K, other=0.0))
    result = tl.zeros((BLOCK, BK), tl.float32)
    for v0 in range(0, V, BV):
        if DESCRIBED:
            y_tile = y.load([start + block * BLOCK, head * V + v0])
            state_tile = tl.trans(states.load([(chunk * H + head) * K + tile_k * BK, v0]))
        else:
            cols = v0 + tl.arange(0, BV)
            at = (((start + in_chunk).to(tl.int64) * H + head) * V)[:, None] + cols[None, :]
            y_tile = tl.load(y + at, mask=(in_chunk < length)[:, None] & (cols < V)[None, :], other=0.0)
            at = ((chunk * H + head).to(tl.int64) * K + cols_k)[None, :] * V + cols[:, None]
            state_tile = tl.load(states + at, mask=inside_k & (cols < V)[:, None], other=0.0)
        result = tl.dot(y_tile, state_tile, result, input_precision=PRECISION)
    if TRANSPOSED:
        tl.store(sources + at_block + block * H * K, tl.sum(result * own_tile, 0), mask=cols_k < K)
    pairs = d_attention + (chunk.to(tl.int64) * C * H + head) * C
    for step in tl.range(num_far, num_stages=2):  # three tiles a step: with more stages one program fills a processor
        far = blocks - 1 - step if TRANSPOSED else step
        ahead = tl.maximum(far - 1, 0) if TRANSPOSED else far + 1
        next_decay = tl.load(block_decay + at_block + ahead * H * K, mask=cols_k < K, other=0.0)
        weights = _block_weights(pairs, in_chunk, far, H, C, TRANSPOSED)
        tile = _block_tile(other + padded, far, cols_k, H, K)
        result = tl.dot(weights, tile, result * factor[None, :], input_precision=PRECISION)
        if not EXACT:
            result = tl.dot(weights, _block_tile(other_rest + padded, far, cols_k, H, K), result)
        factor = tl.exp(next_decay)
    decay = tl.load(block_decay + at_block + block * H * K, mask=cols_k < K, other=0.0)
    weights = _block_weights(pairs, in_chunk, block, H, C, TRANSPOSED)
    tile = _block_tile(other + padded, block, cols_k, H, K)
    product = tl.dot(weights, tile, input_precision=PRECISION)
    if not EXACT:
        product = tl.dot(weights, _block_tile(other_rest + padded, block, cols_k, H, K), product)
        row = ((chunk * C + in_chunk).to(tl.int64) * H + head) * BLOCK
        at = row[None, :] + tokens[:, None] if TRANSPOSED else row[:, None] + tokens[None, :]
        product = tl.dot(tl.load(remainder + at), tile, product)
    undecayed = tl.where(is_strong, 0.0, tl.exp(tl.minimum(-decay, 80.0)))
    result += product * undecayed[None, :]
    tl.store(out + at_own, result, mask=inside_k)


@triton.jit
def _block_weights(pairs, in_chunk, block, H: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Gradient of the attention of some tokens to a block, or of a block to them."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    if TRANSPOSED:
        weights = tl.load(pairs + (rows * (H * C))[None, :] + in_chunk[:, None])
    else:
        weights = tl.load(pairs + (in_chunk * (H * C))[:, None] + rows[None, :])
    return weights


@triton.jit
def _block_tile(x, block, cols_k, H: tl.constexpr, K: tl.constexpr):
    """A block of x, which starts at its chunk: [64, BK]."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(x + (rows * (H * K))[:, None] + cols_k[None, :], mask=(cols_k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def inside_gradient_kernel(
    q, k, log_decay, d_attention, remainder, dq_block, dk_block, overlap, sources,
    before, after, block_decay, strong, chunk_table, windows, dq, dk, d_log_decay,
    scale, NUM_CHUNKS,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, TILES_V: tl.constexpr,
    STRONG: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and log_decay for one chunk and BK key channels, its blocks from last to first, from what
    key_gradient_kernel left (dq_block, dk_block); for the chunks with a strong decay, or for those without.

    The gradient of a log decay is the sum of q k dA over all pairs (source, reader) around its token; going back
    over a token changes that sum by `change` = q dq - k dk. Both sides of a pair use the same factors to 16 bits, two
    bf16 numbers each, so that pairs which have ended cancel; STRONG leaves out the token's own pair, which would hide
    the rest.
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
    # Pairs around the end of the chunk: from before it through it, and from inside it.
    crossing = tl.zeros((BK,), tl.float32)
    for tile_v in tl.static_range(TILES_V):
        at_overlap = ((tile_v * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * K + cols
        crossing += tl.load(overlap + at_overlap, mask=cols < K, other=0.0)
    decay = tl.load(before + table + (blocks - 1) * H * K, mask=cols < K, other=0.0)
    decay += tl.load(block_decay + table + (blocks - 1) * H * K, mask=cols < K, other=0.0)
    crossing *= tl.exp(decay)
    for i in tl.static_range(blocks):
        decay = tl.load(after + table + i * H * K, mask=cols < K, other=0.0)
        crossing += tl.load(sources + table + i * H * K, mask=cols < K, other=0.0) * tl.exp(decay)
    from_start, to_end = _window(windows, FROM_START, rows), _window(windows, TO_END, rows)
    for step in range(blocks):
        in_chunk = rows + (blocks - 1 - step) * BLOCK
        at = (in_chunk * (H * K))[:, None] + cols[None, :]
        mask = (in_chunk < length)[:, None] & inside
        dq_tile = tl.load(dq_block + padded + at, mask=inside, other=0.0)
        dk_tile = tl.load(dk_block + padded + at, mask=inside, other=0.0)
        queries = tl.load(q + token + at, mask=mask, other=0.0).to(tl.float32) * scale
        keys = tl.load(k + token + at, mask=mask, other=0.0).to(tl.float32)
        high, low = _split(tl.load(log_decay + token + at, mask=mask, other=0.0).to(tl.float32), EXACT)
        dq_tile *= tl.exp(_sums(from_start, high, low, EXACT))
        dk_tile *= tl.exp(_sums(to_end, high, low, EXACT))
        change = queries * dq_tile - keys * dk_tile
        if STRONG:
            pairs = d_attention + (chunk.to(tl.int64) * C * H + head) * C
            weights = tl.load(pairs + (in_chunk * (H * C))[:, None] + in_chunk[None, :])
            mirrored = tl.load(pairs + (in_chunk * (H * C))[None, :] + in_chunk[:, None])
            diagonal = rows[:, None] == rows[None, :]
            own = tl.sum(tl.where(diagonal, weights.to(tl.float32), 0.0), 1)[:, None]
            weights += mirrored  # symmetric: a pair of blocks gives both the later's dq and the earlier's dk
            if not EXACT:
                pairs = remainder + ((chunk * C).to(tl.int64) * H + head) * BLOCK
                weights_rest = tl.load(pairs + (in_chunk * (H * BLOCK))[:, None] + rows[None, :])
                own += tl.sum(tl.where(diagonal, weights_rest.to(tl.float32), 0.0), 1)[:, None]
                weights_rest += tl.load(pairs + (in_chunk * (H * BLOCK))[None, :] + rows[:, None])
            for level in range(LEVELS):
                later = (((rows >> level) & 1) != 0)[:, None]
                factor = tl.exp(_sums(_window(windows, level, rows), high, low, EXACT))
                both = tl.where(later, queries, keys) * factor
                both_high, both_low = _split(both, EXACT)
                merged = (rows[:, None] ^ rows[None, :]) >> level == 1
                picked = tl.where(merged, weights, 0.0).to(weights.dtype)
                product = tl.dot(picked, both_high, input_precision=PRECISION)
                if not EXACT:
                    product = tl.dot(picked, both_low, product)
                    product = tl.dot(tl.where(merged, weights_rest, 0.0).to(weights.dtype), both_high, product)
                change += tl.where(later, product, -product) * both
                product *= factor
                dq_tile += tl.where(later, product, 0.0)
                dk_tile += tl.where(later, 0.0, product)
            dq_tile += own * keys
            dk_tile += own * queries
        tl.store(dq + token + at, (dq_tile * scale).to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + token + at, dk_tile.to(dk.dtype.element_ty), mask=mask)
        high, low = _split(change, EXACT)
        d_decay = crossing[None, :] + change + _sums(to_end, high, low, EXACT)
        crossing += tl.sum(change, 0)
        tl.store(d_log_decay + token + at, d_decay.to(d_log_decay.dtype.element_ty), mask=mask)
