"""Triton kernels of state space duality (Mamba2) for large states; docs/kernels.md describes the algorithm.

Shape letters: T time, H heads, G groups, P head dim, N state size, C tokens per chunk (a state is kept for each),
NC chunks of all segments together, S segments; R = H / G * P rows of state per group. Tensors of the caller are
[T, H, P] or [T, G, N] (batch and segments laid out one after the other); tensors marked "padded" are
[NC * C, H, P], each segment padded with zeros to whole chunks. `sums` is the log decay summed from the start of the
chunk up to each token, [NC, H, C]; `steps` is dt in the same layout, zero for padding; `to_end` is dt times the decay
to the chunk's end, `to_block_end` to the block's. A block is 64 tokens:
`block_decay` [NC * C / 64, H] is its log decay, and "scaled" tensors [NC * C, H, P] hold x dt decayed to the end of
its block, or the gradient of the output decayed from the start of its block. Decays are in natural logarithms.

chunk_table [NC, 2]: first token of the chunk, number of tokens.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp four: it cares for denormal numbers


@triton.jit
def _pair(index, PARTS: tl.constexpr):
    """(i, j) of the pairs (0, 0), (1, 0), (1, 1), (2, 0), ..., of which there are PARTS (PARTS + 1) / 2."""
    i = index * 0
    for row in tl.static_range(1, PARTS):
        i += (index >= row * (row + 1) // 2).to(tl.int32)
    return i, index - i * (i + 1) // 2


@triton.jit
def sums_kernel(
    dt, A, chunk_table, sums, steps, to_block_end, to_end, block_decay,
    H: tl.constexpr, C: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    chunk, heads = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    blocks: tl.constexpr = C // 64
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, C)
    token = (start + rows).to(tl.int64)
    mask = (rows < length)[:, None] & (heads < H)[None, :]
    step = tl.load(dt + token[:, None] * H + heads[None, :], mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(A + heads, mask=heads < H, other=0.0).to(tl.float32)
    at = ((chunk * H).to(tl.int64) + heads[None, :]) * C + rows[:, None]
    decay = step * rate[None, :]
    up_to = tl.cumsum(decay, 0)
    tl.store(sums + at, up_to, mask=(heads < H)[None, :])
    tl.store(steps + at, step, mask=(heads < H)[None, :])
    tl.store(to_end + at, step * tl.exp(tl.sum(decay, 0)[None, :] - up_to), mask=(heads < H)[None, :])
    by_block = tl.reshape(decay, (blocks, 64, BH))
    total = tl.sum(by_block, 1)
    after = tl.reshape(total[:, None, :] - tl.cumsum(by_block, 1), (C, BH))
    tl.store(to_block_end + at, step * tl.exp(after), mask=(heads < H)[None, :])
    at = (chunk * blocks + tl.arange(0, blocks))[:, None].to(tl.int64) * H + heads[None, :]
    tl.store(block_decay + at, total, mask=(heads < H)[None, :])


@triton.jit
def scale_kernel(
    x, to_block_end, chunk_table, out, H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """x (padded) times dt and the decay to its block's end."""
    block, head = tl.program_id(0), tl.program_id(1)
    chunk = block // (C // BLOCK)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    in_chunk = (block % (C // BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(to_block_end + (chunk * H + head).to(tl.int64) * C + in_chunk)
    for p0 in range(0, P, BP):
        cols = p0 + tl.arange(0, BP)
        at = (((start + in_chunk).to(tl.int64) * H + head) * P)[:, None] + cols[None, :]
        tile = tl.load(x + at, mask=(in_chunk < length)[:, None] & (cols < P)[None, :], other=0.0)
        at = (((chunk * C + in_chunk).to(tl.int64) * H + head) * P)[:, None] + cols[None, :]
        tl.store(out + at, (tile.to(tl.float32) * factor[:, None]).to(tile.dtype), mask=(cols < P)[None, :])


@triton.jit
def scores_kernel(
    C_in, B_in, scores, rest, chunk_table,
    G: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    HAS_REST: tl.constexpr,
):  # fmt: skip
    """C B^T for BM x BM tokens of one chunk, on and below the diagonal: [NC, G, C, C], shared by a group's heads; and
    what rounding took away from it (rest, the same shape)."""
    parts: tl.constexpr = C // BM
    pairs: tl.constexpr = parts * (parts + 1) // 2
    chunk, group = tl.program_id(0) // pairs, tl.program_id(1)
    i, j = _pair(tl.program_id(0) % pairs, parts)
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
    row = (chunk * G + group).to(tl.int64) * C + to_row
    rounded = result.to(scores.dtype.element_ty)
    tl.store(scores + row[:, None] * C + from_row[None, :], rounded)
    if HAS_REST:
        tl.store(rest + row[:, None] * C + from_row[None, :], (result - rounded).to(rest.dtype.element_ty))


@triton.jit
def _exact(scores, rest, at, HAS_REST: tl.constexpr):
    """A tile of the scores in fp32."""
    score = tl.load(scores + at).to(tl.float32)
    return score + tl.load(rest + at) if HAS_REST else score


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def output_kernel(
    reads, states, scores, near_scores, rest, scaled, values, x, D, sums, steps, to_block_end, block_decay, chunk_table,
    out, d_steps, begun, kept, d_D,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BP: tl.constexpr, BN: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_D: tl.constexpr, HAS_REST: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The output for one block and one head, from reads = C, the states, values = x and scaled x.

    TRANSPOSED: the gradient of x, from reads = B, the gradients of the states, values = the gradient of the output
    and that scaled; also x times the gradient of dt x, summed over the head dim (d_steps [P / BP, NC, H, C]), dt times
    its parts from the chunk's later blocks (begun, the same shape) and from after the chunk (kept), and the gradient
    of D for these tokens and channels (d_D [P / BP, NC * C / 64, H]).

    The other blocks of the chunk are taken from the far end to this one: what is gathered is decayed over each by one
    scalar, so that the shared scores are used as they are. Only inside the block does each pair of tokens get a decay
    of its own. What that needs is loaded first, so that nothing waits for it later.

    DESCRIBED: reads, states, scores and scaled are descriptors, of [64, BN], [BP, BN], [64, 64] and [64, BP];
    near_scores are the scores by pointer.
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    blocks: tl.constexpr = C // 64
    head, tile_p = tl.program_id(0) // tiles_p, tl.program_id(0) % tiles_p
    chunk, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    group = head // (H // G)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols_p = block * BLOCK + tl.arange(0, BLOCK), tile_p * BP + tl.arange(0, BP)
    inside_p = (cols_p < P)[None, :]
    mask = (rows < length)[:, None] & inside_p
    at = (start.to(tl.int64) * H + head) * P + (rows * (H * P))[:, None] + cols_p[None, :]
    near = tl.load(values + at, mask=mask, other=0.0)
    if TRANSPOSED:
        inputs = tl.load(x + at, mask=mask, other=0.0)
    others = tl.arange(0, BLOCK)
    first_row = (chunk * G + group) * C
    row_scores = first_row.to(tl.int64)
    if TRANSPOSED:
        at_near = (row_scores + block * BLOCK + others)[None, :] * C + rows[:, None]
    else:
        at_near = (row_scores + rows)[:, None] * C + (block * BLOCK + others)[None, :]
    weights = _exact(near_scores, rest, at_near, HAS_REST)
    table = (chunk * H + head).to(tl.int64) * C
    own, other = tl.load(sums + table + rows), tl.load(sums + table + block * BLOCK + others)
    decays = block_decay + (chunk * blocks).to(tl.int64) * H + head
    decay = tl.load(decays + (blocks - 1 if TRANSPOSED else 0) * H)
    if TRANSPOSED:
        step_own, until_end = tl.load(steps + table + rows), tl.load(to_block_end + table + rows)
        border, end = tl.load(sums + table + block * BLOCK + BLOCK - 1), tl.load(sums + table + C - 1)
        weights *= tl.exp2((other[None, :] - own[:, None]) * LOG2E)
        weights = tl.where(tl.arange(0, BLOCK)[:, None] <= others[None, :], weights, 0.0)
    else:
        border = tl.load(sums + table + block * BLOCK - 1, mask=block > 0, other=0.0)
        weights *= tl.exp2((own[:, None] - other[None, :]) * LOG2E)
        weights *= tl.load(steps + table + block * BLOCK + others)[None, :]
        weights = tl.where(tl.arange(0, BLOCK)[:, None] >= others[None, :], weights, 0.0)
    weights = weights.to(near.dtype)

    result = tl.zeros((BLOCK, BP), tl.float32)
    for n0 in range(0, N, BN):
        if DESCRIBED:
            tile = reads.load([start + block * BLOCK, group * N + n0])
            state_tile = tl.trans(states.load([(chunk * H + head) * P + tile_p * BP, n0]))
        else:
            cols = n0 + tl.arange(0, BN)
            at_read = (((start + rows).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
            tile = tl.load(reads + at_read, mask=(rows < length)[:, None] & (cols < N)[None, :], other=0.0)
            at_state = ((chunk * H + head).to(tl.int64) * P + cols_p)[None, :] * N + cols[:, None]
            state_tile = tl.load(states + at_state, mask=inside_p & (cols < N)[:, None], other=0.0)
        result = tl.dot(tile, state_tile, result, input_precision=PRECISION)
    at_table = ((tile_p * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * C + rows
    if TRANSPOSED:  # x rounded as in the states that these pairs go through
        until_chunk_end = tl.exp(end - border)
        scaled_x = (inputs.to(tl.float32) * until_end[:, None]).to(inputs.dtype)
        tl.store(kept + at_table, tl.sum(result * scaled_x.to(tl.float32), 1) * until_chunk_end)
        exactly_kept = tl.sum(result * inputs.to(tl.float32), 1) * until_chunk_end
    for step in range(blocks - 1 - block if TRANSPOSED else block):
        far_block = blocks - 1 - step if TRANSPOSED else step
        result *= tl.exp(decay)  # loaded one step ahead: the pipeliner does not see it
        decay = tl.load(decays + (tl.maximum(far_block - 1, 0) if TRANSPOSED else far_block + 1) * H)
        if DESCRIBED:
            if TRANSPOSED:
                far_weights = tl.trans(scores.load([first_row + far_block * BLOCK, block * BLOCK]))
            else:
                far_weights = scores.load([first_row + block * BLOCK, far_block * BLOCK])
            tile = scaled.load([chunk * C + far_block * BLOCK, head * P + tile_p * BP])
        else:
            distant = far_block * BLOCK + tl.arange(0, BLOCK)
            if TRANSPOSED:
                far_weights = tl.load(scores + (row_scores + distant)[None, :] * C + rows[:, None])
            else:
                far_weights = tl.load(scores + (row_scores + rows)[:, None] * C + distant[None, :])
            at_tile = ((chunk * C + distant).to(tl.int64) * H + head)[:, None] * P + cols_p[None, :]
            tile = tl.load(scaled + at_tile, mask=inside_p, other=0.0)
        result = tl.dot(far_weights, tile, result, input_precision=PRECISION)
    if TRANSPOSED:
        gathered = tl.sum(result * inputs.to(tl.float32), 1)
        tl.store(begun + at_table, (gathered - exactly_kept) * until_end)
    result *= tl.exp(border - own if TRANSPOSED else own - border)[:, None]
    result = tl.dot(weights, near, result, input_precision=PRECISION)
    if TRANSPOSED:
        tl.store(d_steps + at_table, tl.sum(result * inputs.to(tl.float32), 1))
        result *= step_own[:, None]
        if HAS_D:
            result += tl.load(D + head).to(tl.float32) * near.to(tl.float32)
            at_block = ((tile_p * NUM_CHUNKS + chunk) * blocks + block) * H + head
            tl.store(d_D + at_block, tl.sum(tl.sum(near.to(tl.float32) * inputs.to(tl.float32), 1), 0))
    elif HAS_D:
        result += tl.load(D + head).to(tl.float32) * near.to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def near_score_gradient_kernel(
    d_out, x, scores, rest, sums, steps, chunk_table, d_scores, ended, scaled,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BP: tl.constexpr,
    HAS_REST: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores inside one block, summed over the heads of a group: the diagonal blocks of d_scores
    [NC, G, C, C]. And for each head and token the products of scores and their gradients, without the diagonal, summed
    over the token's sources: ended [NC, H, C / 64, C], by the sources' block and the token; here, in the token's own
    block, less those summed over its readers.

    On the way the scaled d_out is written, [NC * C, H, P], for what comes after. DESCRIBED: it, d_out and x are
    descriptors, of [64, BP].
    """
    blocks: tl.constexpr = C // 64
    chunk, block, group = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    in_block = tl.arange(0, BLOCK)
    rows = block * BLOCK + in_block
    row_scores = (chunk * G + group).to(tl.int64) * C
    at_scores = (row_scores + rows)[:, None] * C + rows[None, :]
    score = _exact(scores, rest, at_scores, HAS_REST)
    score = tl.where(in_block[:, None] > in_block[None, :], score, 0.0)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    # What the pipeliner does not see is loaded one step ahead.
    table = (chunk * H + group * (H // G)).to(tl.int64) * C
    next_sum, next_step = tl.load(sums + table + rows), tl.load(steps + table + rows)
    next_before = tl.load(sums + table + block * BLOCK - 1, mask=block > 0, other=0.0)
    for h in range(H // G):
        decay, step, before = next_sum, next_step, next_before
        at_next = table + tl.minimum(h + 1, H // G - 1) * C
        next_sum, next_step = tl.load(sums + at_next + rows), tl.load(steps + at_next + rows)
        next_before = tl.load(sums + at_next + block * BLOCK - 1, mask=block > 0, other=0.0)
        from_start = tl.exp(decay - before)[:, None]
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for p0 in range(0, P, BP):
            first_p = (group * (H // G) + h) * P + p0
            cols, channel = p0 + tl.arange(0, BP), first_p + tl.arange(0, BP)[None, :]
            if DESCRIBED:
                values = x.load([start + block * BLOCK, first_p])
                gradient = d_out.load([start + block * BLOCK, first_p])
            else:
                at = (start.to(tl.int64) + rows)[:, None] * (H * P) + channel
                inside = (rows < length)[:, None] & (cols < P)[None, :]
                values = tl.load(x + at, mask=inside, other=0.0)
                gradient = tl.load(d_out + at, mask=inside, other=0.0)
            decayed = (gradient.to(tl.float32) * from_start).to(gradient.dtype)
            if DESCRIBED:
                scaled.store([chunk * C + block * BLOCK, first_p], decayed)
            else:
                padded = (chunk.to(tl.int64) * C + rows)[:, None] * (H * P) + channel
                tl.store(scaled + padded, decayed, mask=(cols < P)[None, :])
            product = tl.dot(gradient, tl.trans(values), product, input_precision=PRECISION)
        product *= tl.exp2(tl.abs(decay[:, None] - decay[None, :]) * -LOG2E) * step[None, :]
        total += product
        product *= score
        at = (table + h * C) * blocks + block * C + rows
        tl.store(ended + at, tl.sum(product, 1) - tl.sum(product, 0))
    total = tl.where(in_block[:, None] >= in_block[None, :], total, 0.0)
    tl.store(d_scores + at_scores, total.to(d_scores.dtype.element_ty))


@triton.jit
def far_score_gradient_kernel(
    d_out, x, scores, rest, sums, to_block_end, chunk_table, d_scores, ended,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BP: tl.constexpr,
    HAS_REST: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As near_score_gradient_kernel, between two blocks of a chunk: a later block reads an earlier one. Nobody reads
    d_scores above the diagonal blocks.

    The sums over readers would take a third of the time: they are made in decay_gradient_kernel, of what the output
    kernel has gathered. For that, where ended is free (for tokens before the sources' block) it gets each reader's sum
    over its sources in the token's block, times the log decay from the source to that block's end.
    """
    blocks: tl.constexpr = C // 64
    pairs: tl.constexpr = blocks * (blocks - 1) // 2
    chunk, group = tl.program_id(0) // pairs, tl.program_id(1)
    i, j = _pair(tl.program_id(0) % pairs, blocks - 1)
    i += 1
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    in_block = tl.arange(0, BLOCK)
    reader, source = i * BLOCK + in_block, j * BLOCK + in_block
    at_scores = ((chunk * G + group).to(tl.int64) * C + reader)[:, None] * C + source[None, :]
    score = _exact(scores, rest, at_scores, HAS_REST)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    table = (chunk * H + group * (H // G)).to(tl.int64) * C
    for h in range(H // G):  # loading ahead what the pipeliner does not see would take registers that are not there
        at_head = table + h * C
        border, until_border = tl.load(sums + at_head + j * BLOCK + BLOCK - 1), tl.load(to_block_end + at_head + source)
        from_border = tl.exp(tl.load(sums + at_head + reader) - border)
        left = border - tl.load(sums + at_head + source)
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for p0 in range(0, P, BP):
            first_p = (group * (H // G) + h) * P + p0
            if DESCRIBED:
                gradient = d_out.load([start + i * BLOCK, first_p])
                values = x.load([start + j * BLOCK, first_p])
            else:
                inside, channel = (p0 + tl.arange(0, BP) < P)[None, :], first_p + tl.arange(0, BP)[None, :]
                at = (start.to(tl.int64) + reader)[:, None] * (H * P) + channel
                gradient = tl.load(d_out + at, mask=(reader < length)[:, None] & inside, other=0.0)
                at = (start.to(tl.int64) + source)[:, None] * (H * P) + channel
                values = tl.load(x + at, mask=(source < length)[:, None] & inside, other=0.0)
            product = tl.dot(gradient, tl.trans(values), product, input_precision=PRECISION)
        product *= until_border[None, :]
        total += product * from_border[:, None]
        product *= score
        at = at_head * blocks
        tl.store(ended + at + j * C + reader, tl.sum(product, 1) * from_border)
        tl.store(ended + at + i * C + source, tl.sum(product * left[None, :], 1) * from_border)
    tl.store(d_scores + at_scores, total.to(d_scores.dtype.element_ty))


@triton.jit
def _factor(entry, TRANSPOSED: tl.constexpr):
    return entry + 0.0 if TRANSPOSED else tl.exp(entry)  # an operation: the pipeliner wants one between two steps


@triton.jit(do_not_specialize=["NUM_CHUNKS"])
def key_gradient_kernel(
    x, states, d_scores, own, other, factors, out, overlap, chunk_table,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of C (own = C, other = B, x the gradient of the output) or, TRANSPOSED, of B (own = B, other = C, x and
    the gradients of the states): sum over the group's heads. factors is sums or, TRANSPOSED, to_end.

    overlap [N / BN, NC, H * P / BP, C], not TRANSPOSED: each head's part through the state, times own.
    DESCRIBED: x and states are descriptors, of [BM, BP] and [BP, BN].
    """
    tile_n, group = tl.program_id(0), tl.program_id(2)
    chunk, part = tl.program_id(1) // (C // BM), tl.program_id(1) % (C // BM)
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows, cols = part * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    mask = (rows < length)[:, None] & (cols < N)[None, :]
    at_out = (((start + rows).to(tl.int64) * G + group) * N)[:, None] + cols[None, :]
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    first: tl.constexpr = H // G * tiles_p
    result = tl.zeros((BM, BN), tl.float32)
    if not TRANSPOSED:
        own_tile = tl.load(own + at_out, mask=mask, other=0.0)
    # Factors are loaded two steps ahead by hand: the pipeliner does not see them, and a step is shorter than a load.
    table = factors + (chunk * H + group * (H // G)).to(tl.int64) * C + rows
    factor = _factor(tl.load(table), TRANSPOSED)
    next_entry = tl.load(table + min(1, first - 1) // tiles_p * C)
    for step in range(first):
        ahead = tl.load(table + tl.minimum(step + 2, first - 1) // tiles_p * C)
        head = group * (H // G) + step // tiles_p
        first_p = (step % tiles_p) * BP
        if DESCRIBED:
            tile = x.load([start + part * BM, head * P + first_p])
            state = states.load([(chunk * H + head) * P + first_p, tile_n * BN])
        else:
            in_head = first_p + tl.arange(0, BP)
            at = (((start + rows).to(tl.int64) * H + head) * P)[:, None] + in_head[None, :]
            tile = tl.load(x + at, mask=(rows < length)[:, None] & (in_head < P)[None, :], other=0.0)
            at = ((chunk * H + head).to(tl.int64) * P + in_head)[:, None] * N + cols[None, :]
            state = tl.load(states + at, mask=(in_head < P)[:, None] & (cols < N)[None, :], other=0.0)
        product = tl.dot(tile, state, input_precision=PRECISION)
        result += product * factor[:, None]
        if not TRANSPOSED:
            at = ((tile_n * NUM_CHUNKS + chunk) * (G * first) + group * first + step).to(tl.int64) * C + rows
            tl.store(overlap + at, tl.sum(product * own_tile.to(tl.float32), 1) * factor)
        factor, next_entry = _factor(next_entry, TRANSPOSED), ahead
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
    ended, begun, kept, read_overlap, state_overlap, d_steps, A, sums, steps, to_block_end, chunk_table, d_dt, d_A,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, NUM_CHUNKS,
    TILES_P: tl.constexpr, TILES_D: tl.constexpr, TILES_N: tl.constexpr, TILES_S: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradient of dt, and of A for each chunk [NC, H]: one chunk of one head.

    The gradient of a log decay is the sum over all pairs (source, reader) around its token. At the chunk's start these
    are read_overlap and, with readers after the chunk, state_overlap; at each token it changes by what begins there
    less what ends (ended, read_overlap). What begins is kept for after the chunk, or begun for its later blocks. The
    latter is made of rounded factors where ended is exact. So that pairs which have ended cancel and the gradient of A
    is exact for them, the entries of each block get the least change, weighted by the squares of dt decayed to the
    block's end, that makes their sum and their sum times the log decay left to the block's end what they are for ended.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = C // 64
    start, length = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    rows = tl.arange(0, C)
    table = (chunk * H + head).to(tl.int64) * C
    change, moment, total = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((blocks,), tl.float32)
    for block in range(blocks):
        entry = tl.load(ended + (table * blocks + block * C) + rows)
        change -= tl.where(rows >= block * 64, entry, 0.0)
        moment += tl.where(rows < block * 64, entry, 0.0)
        later = tl.sum(tl.where(rows >= block * 64 + 64, entry, 0.0), 0)
        total += tl.where(tl.arange(0, blocks) == block, later, 0.0)
    read = tl.zeros((C,), tl.float32)
    for tile in range(TILES_N * TILES_P):
        at = ((tile // TILES_P * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * TILES_P + tile % TILES_P
        read += tl.load(read_overlap + at * C + rows)
    through = tl.zeros((BP,), tl.float32)
    for tile in range(TILES_S):
        for p0 in range(0, P, BP):
            cols = p0 + tl.arange(0, BP)
            at = ((tile * NUM_CHUNKS + chunk) * H + head).to(tl.int64) * P + cols
            through += tl.load(state_overlap + at, mask=cols < P, other=0.0)
    direct, within, after = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for tile in range(TILES_D):
        at = (tile * NUM_CHUNKS).to(tl.int64) * H * C + table + rows
        direct += tl.load(d_steps + at)
        within += tl.load(begun + at)
        after += tl.load(kept + at)
    within = tl.reshape(within, (blocks, 64))
    sums_in_blocks = tl.reshape(tl.load(sums + table + rows), (blocks, 64))
    left = tl.sum(tl.where(tl.arange(0, 64)[None, :] == 63, sums_in_blocks, 0.0), 1)[:, None] - sums_in_blocks
    share = tl.reshape(tl.load(to_block_end + table + rows), (blocks, 64))
    share /= tl.maximum(tl.max(tl.abs(share), 1), 1e-30)[:, None]
    share *= share
    weight = tl.maximum(tl.sum(share, 1), 1.0)
    mean_left = tl.sum(share * left, 1) / weight
    lacking = total - tl.sum(within, 1)
    lacking_moment = tl.sum(tl.reshape(moment, (blocks, 64)), 1) - tl.sum(within * left, 1) - lacking * mean_left
    left -= mean_left[:, None]
    slope = lacking_moment / tl.maximum(tl.sum(share * left * left, 1), 1e-30)
    within += share * ((lacking / weight)[:, None] + left * slope[:, None])
    change += tl.reshape(within, (C,)) + after - read
    around = tl.sum(through, 0) * tl.exp(tl.load(sums + table + C - 1))
    d_decay = tl.cumsum(change, 0) - change + tl.sum(read, 0) + around
    step = tl.load(steps + table + rows)
    rate = tl.load(A + head).to(tl.float32)
    at = (start + rows).to(tl.int64) * H + head
    tl.store(d_dt + at, (direct + rate * d_decay).to(d_dt.dtype.element_ty), mask=rows < length)
    tl.store(d_A + chunk * H + head, tl.sum(d_decay * step, 0))
