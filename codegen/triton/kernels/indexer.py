# mypy: ignore-errors
"""The lightning indexer of sparse attention: scores of cached positions, and the choice of the best of them.

DeepSeek-V3.2 (arXiv 2512.02556, sec. 2.1). A token that sees no more than TOP positions takes them all, unscored.
"""

import triton
import triton.language as tl


@triton.jit
def index_scores(
    q_ptr, weight_ptr, key_ptr, pages_ptr, seq_ptr, pos_ptr, score_ptr,
    q_row, q_head, weight_row, scale, max_pages, width,
    HEADS: tl.constexpr, HEADS2: tl.constexpr, DIM: tl.constexpr, DIM2: tl.constexpr, PAGE: tl.constexpr,
    KEY_ROW: tl.constexpr, TOP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """score[T, width] of the cached positions 0..pos[t]: sum over heads of `weight · relu(scale · q · key)`.

    q[T, HEADS, DIM] at distances of its own, weight[T, HEADS]; key opens the index keys of the cache's rows.
    """
    token = tl.program_id(1)
    position = tl.load(pos_ptr + token)
    first = tl.program_id(0) * BN
    if (position >= TOP) & (first <= position):
        head = tl.arange(0, HEADS2)
        column = tl.arange(0, DIM2)
        key = first + tl.arange(0, BN)
        sequence = tl.load(seq_ptr + token)
        page = tl.load(pages_ptr + sequence * max_pages + first // PAGE).to(tl.int64)
        wide = token.to(tl.int64)
        q_at = q_ptr + wide * q_row + head[:, None] * q_head + column[None, :]
        q = tl.load(q_at, mask=(head < HEADS)[:, None] & (column < DIM)[None, :], other=0.0)
        k_at = key_ptr + (page * PAGE + key % PAGE)[:, None] * KEY_ROW + column[None, :]
        k = tl.load(k_at, mask=(key <= position)[:, None] & (column < DIM)[None, :], other=0.0)
        product = tl.maximum(tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * scale, 0.0)
        weight = tl.load(weight_ptr + wide * weight_row + head, mask=head < HEADS, other=0.0).to(tl.float32)
        score = tl.sum(product * weight[:, None], 0)
        tl.store(score_ptr + wide * width + key, score, mask=key <= position)


@triton.jit
def ordered(score):
    """Float32 as uint32 in the same order; both zeros are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (flipped ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def index_select(score_ptr, pos_ptr, chosen_ptr, width, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """chosen[T, TOP]: positions of the best scores among 0..pos[t] in rising order, equal ones by position; then -1.

    The least score that is kept is found digit by digit, from counts of the digits that can follow (a radix selection
    of four passes over a row that the cache holds).
    """
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(pos_ptr + token) + 1
    out = chosen_ptr + token * TOP
    lane = tl.arange(0, BLOCK)
    if count <= TOP:
        for first in range(0, TOP, BLOCK):
            at = first + lane
            tl.store(out + at, tl.where(at < count, at, -1), mask=at < TOP)
    else:
        row = score_ptr + token * width
        digit = tl.arange(0, 256)
        known = tl.full((), 0, tl.uint32)
        need = tl.full((), TOP, tl.int32)
        for turn in tl.static_range(4):
            counts = tl.zeros((256,), dtype=tl.int32)
            for first in range(0, count, BLOCK):
                at = first + lane
                value = ordered(tl.load(row + at, mask=at < count, other=0.0))
                fits = at < count
                if turn > 0:
                    fits = fits & ((value >> (32 - 8 * turn)) == known)
                counts += tl.histogram(((value >> (24 - 8 * turn)) & 255).to(tl.int32), 256, mask=fits)
            total = tl.sum(counts, 0)
            from_here = total - tl.cumsum(counts, 0) + counts
            best = tl.sum((from_here >= need).to(tl.int32), 0) - 1
            need -= tl.sum(tl.where(digit == best, from_here - counts, 0), 0)
            known = (known << 8) | best.to(tl.uint32)
        written = tl.full((), 0, tl.int32)
        equal_before = tl.full((), 0, tl.int32)
        for first in range(0, count, BLOCK):
            at = first + lane
            value = ordered(tl.load(row + at, mask=at < count, other=0.0))
            equal = ((value == known) & (at < count)).to(tl.int32)
            rank = equal_before + tl.cumsum(equal, 0)
            take = ((value > known) & (at < count)) | ((equal > 0) & (rank <= need))
            taken = take.to(tl.int32)
            tl.store(out + written + tl.cumsum(taken, 0) - 1, at, mask=take)
            written += tl.sum(taken, 0)
            equal_before += tl.sum(equal, 0)
