"""Triton kernels of state space duality (Mamba2) for large states; docs/kernels.md describes the algorithm.

Shape letters: T time, H heads, G groups, P head dim, N state size, C tokens a chunk (a state is kept for each),
NC chunks of all segments together, S segments; R = H / G * P rows of state a group. Tensors of the caller are
[T, H, P] or [T, G, N] (batch and segments laid out one after the other); tensors marked "padded" are
[NC * C, H, P], each segment padded with zeros to whole chunks. `sums` is the log decay summed from the start of the
chunk up to each token, [NC, H, C]; `steps` is dt in the same layout, zero for padding.

chunk_table [NC, 2]: first token of the chunk, number of tokens. segment_table [S, 3]: first token, one past the
last token, first chunk.
"""

import triton
import triton.language as tl


@triton.jit
def sums_kernel(dt, A, chunk_table, sums, steps, H: tl.constexpr, C: tl.constexpr, BH: tl.constexpr):
    chunk, heads = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, C)
    token = (start + rows).to(tl.int64)
    mask = (rows < length)[:, None] & (heads < H)[None, :]
    step = tl.load(dt + token[:, None] * H + heads[None, :], mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(A + heads, mask=heads < H, other=0.0).to(tl.float32)
    at = ((chunk * H).to(tl.int64) + heads[None, :]) * C + rows[:, None]
    tl.store(sums + at, tl.cumsum(step * rate[None, :], 0), mask=(heads < H)[None, :])
    tl.store(steps + at, step, mask=(heads < H)[None, :])


@triton.jit
def scale_kernel(
    x, sums, steps, chunk_table, out,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, TO_END: tl.constexpr,
):  # fmt: skip
    """x (padded) times dt and the decay to the chunk's end; or, not TO_END, times the decay from its start."""
    block, head = tl.program_id(0), tl.program_id(1)
    chunk = block // (C // 64)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    in_chunk = (block % (C // 64)) * 64 + tl.arange(0, 64)
    table = (chunk * H + head).to(tl.int64) * C
    factor = tl.load(sums + table + in_chunk)
    if TO_END:
        factor = tl.exp(tl.load(sums + table + C - 1) - factor) * tl.load(steps + table + in_chunk)
    else:
        factor = tl.exp(factor)
    for p0 in range(0, P, BP):
        cols = p0 + tl.arange(0, BP)
        at = (((start + in_chunk).to(tl.int64) * H + head) * P)[:, None] + cols[None, :]
        tile = tl.load(x + at, mask=(in_chunk < length)[:, None] & (cols < P)[None, :], other=0.0)
        at = (((chunk * C + in_chunk).to(tl.int64) * H + head) * P)[:, None] + cols[None, :]
        tl.store(out + at, (tile.to(tl.float32) * factor[:, None]).to(tile.dtype), mask=(cols < P)[None, :])


@triton.jit
def scores_kernel(
    C_in, B_in, scores, chunk_table,
    G: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C B^T for BM x BM tokens of one chunk, on and below the diagonal: [NC, G, C, C], shared by a group's heads."""
    parts: tl.constexpr = C // BM
    pairs: tl.constexpr = parts * (parts + 1) // 2
    chunk, group = tl.program_id(0) // pairs, tl.program_id(1)
    pair = tl.program_id(0) % pairs
    i = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32) + (pair >= 6).to(tl.int32)  # (0, 0), (1, 0), (1, 1), ...
    j = pair - i * (i + 1) // 2
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    to_row, from_row = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    result = tl.zeros((BM, BM), tl.float32)
    for n0 in range(0, N, BN):
        cols = n0 + tl.arange(0, BN)
        at = (((start + to_row).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
        reads = tl.load(C_in + at, mask=(to_row < length)[:, None] & (cols < N)[None, :], other=0.0)
        at = (((start + from_row).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
        writes = tl.load(B_in + at, mask=(from_row < length)[:, None] & (cols < N)[None, :], other=0.0)
        result = tl.dot(reads, tl.trans(writes), result, input_precision=PRECISION)
    at = (chunk * G + group).to(tl.int64) * C * C + to_row[:, None] * C + from_row[None, :]
    tl.store(scores + at, result.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def state_kernel(
    x, y, sums, segment_table, first, states, last, other_states, overlap,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BR: tl.constexpr, BN: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one [BR, BN] tile of a segment's state over time, keeping it in registers; rows are (head, head dim).

    Forward: x is decayed to the chunk's end and y is B; states gets the state at the start of each chunk
    [NC, H, P, N]. Reverse: x is the gradient of the output, decayed from the chunk's start, and y is C; states gets
    the gradient of the state at the end of each chunk, and overlap [N / BN, NC, H * P] that gradient times the state
    at the chunk's start (other_states), decayed to its end.
    """
    rows_of_group: tl.constexpr = H // G * P
    tile_r, tile_n = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN)
    segment, group = tl.program_id(1) // G, tl.program_id(1) % G
    first_token, end_token = tl.load(segment_table + 3 * segment), tl.load(segment_table + 3 * segment + 1)
    first_chunk = tl.load(segment_table + 3 * segment + 2)
    blocks: tl.constexpr = C // 64
    num_blocks = (end_token - first_token + C - 1) // C * blocks
    tokens, in_group, cols = tl.arange(0, 64), tile_r * BR + tl.arange(0, BR), tile_n * BN + tl.arange(0, BN)
    row = group * rows_of_group + in_group
    valid = in_group < rows_of_group
    inside = valid[:, None] & (cols < N)[None, :]
    in_state = row[:, None] * N + cols[None, :]
    segment_state = segment.to(tl.int64) * H * P * N + in_state
    state = tl.zeros((BR, BN), tl.float32)
    if HAS_FIRST:
        state += tl.load(first + segment_state, mask=inside, other=0.0).to(tl.float32)
    totals = sums + (row // P) * C + C - 1
    chunk = first_chunk + (tl.maximum(num_blocks - 1, 0) // blocks if REVERSE else 0)
    decay = tl.load(totals + chunk.to(tl.int64) * H * C, mask=valid & (num_blocks > 0), other=0.0)
    for step in range(num_blocks):
        block = num_blocks - 1 - step if REVERSE else step
        chunk = first_chunk + block // blocks
        factor = tl.exp(decay)  # loaded one step ahead: the pipeliner does not see it
        if step % blocks == 0:
            at = chunk.to(tl.int64) * H * P * N + in_state
            tl.store(states + at, state.to(states.dtype.element_ty), mask=inside)
            if REVERSE:
                other = tl.load(other_states + at, mask=inside, other=0.0).to(tl.float32)
                at = (tile_n * NUM_CHUNKS + chunk).to(tl.int64) * H * P + row
                tl.store(overlap + at, tl.sum(other * state, 1) * factor, mask=valid)
        else:
            factor = tl.full((BR,), 1.0, tl.float32)
        padded = (first_chunk * C + block * 64 + tokens).to(tl.int64)
        x_tile = tl.load(x + (padded * H * P)[None, :] + row[:, None], mask=valid[:, None], other=0.0)
        token = first_token + block * 64 + tokens
        at = ((token.to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
        y_tile = tl.load(y + at, mask=(token < end_token)[:, None] & (cols < N)[None, :], other=0.0)
        ahead = first_chunk + (tl.maximum(block - 1, 0) if REVERSE else tl.minimum(block + 1, num_blocks - 1)) // blocks
        decay = tl.load(totals + ahead.to(tl.int64) * H * C, mask=valid, other=0.0)
        state = tl.dot(x_tile, y_tile, state * factor[:, None], input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + segment_state, state, mask=inside)


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def output_kernel(
    reads, states, scores, values, x, D, sums, steps, chunk_table, out, d_steps, d_D,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output for BM tokens of one chunk and one head, from reads = C, the states and values = x.

    TRANSPOSED: the gradient of x, from reads = B, the gradients of the states and values = the gradient of the
    output; also x times the gradient of dt x, summed over the head dim (d_steps [P / BP, NC, H, C]), and the
    gradient of D for these tokens and channels (d_D [P / BP, NC * C / BM, H]).

    The tile is [channels, tokens]: so the decayed scores are a second operand, which the tensor cores read from
    shared memory. ptxas of CUDA 12 overwrites first operands in registers before they are read.
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    head, tile_p = tl.program_id(0) // tiles_p, tl.program_id(0) % tiles_p
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    group = head // (H // G)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols_p = part * BM + tl.arange(0, BM), tile_p * BP + tl.arange(0, BP)
    column_read = (((start + rows).to(tl.int64) * G + group) * N)[None, :]
    state = states + (chunk * H + head).to(tl.int64) * P * N
    result = tl.zeros((BP, BM), tl.float32)
    for n0 in range(0, N, BN):
        cols = n0 + tl.arange(0, BN)
        inside = (rows < length)[None, :] & (cols < N)[:, None]
        tile = tl.load(reads + column_read + cols[:, None], mask=inside, other=0.0)
        inside = (cols_p < P)[:, None] & (cols < N)[None, :]
        state_tile = tl.load(state + cols_p[:, None] * N + cols[None, :], mask=inside, other=0.0)
        result = tl.dot(state_tile, tile, result, input_precision=PRECISION)
    table = (chunk * H + head).to(tl.int64) * C
    own = tl.load(sums + table + rows)
    if TRANSPOSED:
        result *= tl.exp(tl.load(sums + table + C - 1) - own)[None, :]
    else:
        result *= tl.exp(own)[None, :]
    score = scores + (chunk * G + group).to(tl.int64) * C * C
    value = values + (start.to(tl.int64) * H + head) * P
    first = part * BM if TRANSPOSED else 0
    last = C if TRANSPOSED else (part + 1) * BM
    for j0 in range(first, last, BJ):
        others = j0 + tl.arange(0, BJ)
        other = tl.load(sums + table + others)
        if TRANSPOSED:
            weights = tl.load(score + others[:, None] * C + rows[None, :]).to(tl.float32)
            weights *= tl.exp(tl.minimum(other[:, None] - own[None, :], 0.0))
            weights = tl.where(others[:, None] >= rows[None, :], weights, 0.0)
        else:
            weights = tl.load(score + rows[None, :] * C + others[:, None]).to(tl.float32)
            weights *= tl.exp(tl.minimum(own[None, :] - other[:, None], 0.0))
            weights = tl.where(others[:, None] <= rows[None, :], weights, 0.0)
            weights *= tl.load(steps + table + others)[:, None]
        inside = (others < length)[None, :] & (cols_p < P)[:, None]
        tile = tl.load(value + (others * (H * P))[None, :] + cols_p[:, None], mask=inside, other=0.0)
        result = tl.dot(tile, weights.to(tile.dtype), result, input_precision=PRECISION)
    mask = (rows < length)[None, :] & (cols_p < P)[:, None]
    at = (start.to(tl.int64) * H + head) * P + (rows * (H * P))[None, :] + cols_p[:, None]
    if TRANSPOSED:
        inputs = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        at_table = ((tile_p * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * C + rows
        tl.store(d_steps + at_table, tl.sum(result * inputs, 0))
        result *= tl.load(steps + table + rows)[None, :]
        if HAS_D:
            gradient = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
            result += tl.load(D + head).to(tl.float32) * gradient
            at_part = ((tile_p * NUM_CHUNKS + chunk) * (C // BM) + part) * H + head
            tl.store(d_D + at_part, tl.sum(tl.sum(gradient * inputs, 0), 0))
    elif HAS_D:
        result += tl.load(D + head).to(tl.float32) * tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def score_gradient_kernel(
    d_out, x, scores, sums, steps, chunk_table, d_scores, row_sums, column_sums,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of 64 x 64 tokens, summed over the heads of a group [NC, G, C, C], zeros above the
    diagonal; and for each head
    the products of scores and their gradients, without the diagonal, summed over the readers' block (row_sums
    [NC, H, C / 64, C], by source block and reader) and over the sources' (column_sums, by reader block and source)."""
    blocks: tl.constexpr = C // 64
    pairs: tl.constexpr = blocks * (blocks + 1) // 2
    chunk, group = tl.program_id(0) // pairs, tl.program_id(1)
    pair = tl.program_id(0) % pairs
    i = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32) + (pair >= 6).to(tl.int32)
    j = pair - i * (i + 1) // 2
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    to_row, from_row = i * 64 + tl.arange(0, 64), j * 64 + tl.arange(0, 64)
    corner = (chunk * G + group).to(tl.int64) * C * C
    at_scores = to_row[:, None] * C + from_row[None, :]
    score = tl.load(scores + corner + at_scores)
    total = tl.zeros((64, 64), tl.float32)
    for h in range(H // G):
        head = group * (H // G) + h
        token = (start.to(tl.int64) * H + head) * P
        product = tl.zeros((64, 64), tl.float32)
        for p0 in range(0, P, BP):
            cols = p0 + tl.arange(0, BP)
            at = (to_row * (H * P))[:, None] + cols[None, :]
            gradient = tl.load(d_out + token + at, mask=(to_row < length)[:, None] & (cols < P)[None, :], other=0.0)
            at = (from_row * (H * P))[:, None] + cols[None, :]
            values = tl.load(x + token + at, mask=(from_row < length)[:, None] & (cols < P)[None, :], other=0.0)
            product = tl.dot(gradient, tl.trans(values), product, input_precision=PRECISION)
        table = (chunk * H + head).to(tl.int64) * C
        decay = tl.load(sums + table + to_row)[:, None] - tl.load(sums + table + from_row)[None, :]
        product *= tl.exp(tl.minimum(decay, 0.0)) * tl.load(steps + table + from_row)[None, :]
        product = tl.where(to_row[:, None] >= from_row[None, :], product, 0.0)
        total += product
        product = tl.where(to_row[:, None] > from_row[None, :], product * score.to(tl.float32), 0.0)
        tl.store(row_sums + (table * blocks + j * C) + to_row, tl.sum(product, 1))
        tl.store(column_sums + (table * blocks + i * C) + from_row, tl.sum(product, 0))
    tl.store(d_scores + corner + at_scores, total.to(d_scores.dtype.element_ty))
    if i > j:
        mirrored = from_row[:, None] * C + to_row[None, :]
        tl.store(d_scores + corner + mirrored, tl.zeros((64, 64), d_scores.dtype.element_ty))


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def key_gradient_kernel(
    x, states, d_scores, own, other, out, overlap, chunk_table,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of C (own = C, other = B, x the decayed gradient of the output) or, TRANSPOSED, of B (own = B,
    other = C, x decayed to the chunk's end and the gradients of the states): sum over the group's heads.

    overlap [N / BN, NC, H * P / BP, C]: each head's part through the state, times own.
    """
    tile_n, group = tl.program_id(0), tl.program_id(2)
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols = part * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    mask = (rows < length)[:, None] & (cols < N)[None, :]
    at_out = (((start + rows).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
    own_tile = tl.load(own + at_out, mask=mask, other=0.0)
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    first: tl.constexpr = H // G * tiles_p
    row_x = ((chunk * C + rows).to(tl.int64) * H * P)[:, None]
    result = tl.zeros((BM, BN), tl.float32)
    before = tl.zeros((BM,), tl.float32)
    for step in range(first):
        in_head = (step % tiles_p) * BP + tl.arange(0, BP)
        channel = (group * (H // G) + step // tiles_p) * P + in_head
        tile = tl.load(x + row_x + channel[None, :], mask=(in_head < P)[None, :], other=0.0)
        at = (chunk.to(tl.int64) * H * P + channel)[:, None] * N + cols[None, :]
        state = tl.load(states + at, mask=(in_head < P)[:, None] & (cols < N)[None, :], other=0.0)
        result = tl.dot(tile, state, result, input_precision=PRECISION)
        after = tl.sum(result * own_tile.to(tl.float32), 1)
        at = ((tile_n * NUM_CHUNKS + chunk) * (G * first) + group * first + step).to(tl.int64) * C + rows
        tl.store(overlap + at, after - before)
        before = after
    score = d_scores + (chunk * G + group).to(tl.int64) * C * C
    for j0 in range(part * BM if TRANSPOSED else 0, C if TRANSPOSED else (part + 1) * BM, BJ):
        others = j0 + tl.arange(0, BJ)
        if TRANSPOSED:
            weights = tl.load(score + others[None, :] * C + rows[:, None])
        else:
            weights = tl.load(score + rows[:, None] * C + others[None, :])
        at = (((start + others).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
        tile = tl.load(other + at, mask=(others < length)[:, None] & (cols < N)[None, :], other=0.0)
        result = tl.dot(weights, tile, result, input_precision=PRECISION)
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def decay_gradient_kernel(
    row_sums, column_sums, read_overlap, write_overlap, state_overlap, d_steps, A, steps, chunk_table, d_dt, d_A,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    TILES_P: tl.constexpr, TILES_D: tl.constexpr, TILES_N: tl.constexpr, TILES_S: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradient of dt, and of A for each chunk [NC, H]: one chunk of one head.

    The gradient of a log decay is the sum over all pairs (source, reader) around its token. Pairs inside the chunk
    come from row_sums and column_sums, which cancel once both are past; sources before the chunk with readers
    inside from read_overlap, sources inside with readers after it from write_overlap, the rest from state_overlap.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = C // 64
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, C)
    table = (chunk * H + head).to(tl.int64) * C
    change = tl.zeros((C,), tl.float32)
    for other in range(blocks):
        at = (table * blocks + other * C) + rows
        change += tl.load(column_sums + at, mask=rows < (other + 1) * 64, other=0.0)
        change -= tl.load(row_sums + at, mask=rows >= other * 64, other=0.0)
    read, write = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for tile in range(TILES_N * TILES_P):
        at = ((tile // TILES_P * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * TILES_P + tile % TILES_P
        read += tl.load(read_overlap + at * C + rows)
        write += tl.load(write_overlap + at * C + rows)
    through = tl.zeros((BP,), tl.float32)
    for tile in range(TILES_S):
        for p0 in range(0, P, BP):
            cols = p0 + tl.arange(0, BP)
            at = ((tile * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * P + cols
            through += tl.load(state_overlap + at, mask=cols < P, other=0.0)
    change += write - read
    d_decay = tl.cumsum(change, 0) - change + tl.sum(read, 0) + tl.sum(through, 0)
    step = tl.load(steps + table + rows)
    direct = tl.zeros((C,), tl.float32)
    for tile in range(TILES_D):
        direct += tl.load(d_steps + (tile * NUM_CHUNKS).to(tl.int64) * H * C + table + rows)
    rate = tl.load(A + head).to(tl.float32)
    at = (start + rows).to(tl.int64) * H + head
    tl.store(d_dt + at, (direct + rate * d_decay).to(d_dt.dtype.element_ty), mask=rows < length)
    tl.store(d_A + chunk * H + head, tl.sum(d_decay * step, 0))
