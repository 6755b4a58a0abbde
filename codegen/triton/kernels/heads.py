# mypy: ignore-errors
"""Attention with grouped heads of keys and values (Ainslie et al., arXiv 2305.13245) over their paged cache.

The queries of all heads that share a head of keys and values are rows of one block, so that every key is read once for
them. The same loop serves prefill (ragged, with a cached prefix) and decode (shares of the keys in parallel). Softmax
runs in base 2; a log-sum-exp is therefore a base-2 logarithm.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def heads_step(
    q, best, total, acc, cache_ptr, page_ptr, first, begin, position, end, softmax_scale, softcap,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr, PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of BN keys of the online softmax; without MASK every row sees all of them.

    Row m sees the keys `begin[m]..position[m]`; the sequence has `end` keys. q[BM, D2], acc[BM, DV2].
    """
    ROW: tl.constexpr = KV_HEADS * (D + DV)
    head = tl.program_id(1)
    key = first + tl.arange(0, BN)
    page = tl.load(page_ptr + first // PAGE).to(tl.int64)
    at = cache_ptr + (page * PAGE + key % PAGE)[:, None] * ROW
    rd = tl.arange(0, D2)
    rv = tl.arange(0, DV2)
    k_at = at + head * D + rd[None, :]
    v_at = at + KV_HEADS * D + head * DV + rv[None, :]
    if MASK:
        inside = (key < end)[:, None]
        k = tl.load(k_at, mask=inside & (rd < D)[None, :], other=0.0)
        v = tl.load(v_at, mask=inside & (rv < DV)[None, :], other=0.0)
    elif D == D2 and DV == DV2:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(rd < D)[None, :], other=0.0)
        v = tl.load(v_at, mask=(rv < DV)[None, :], other=0.0)
    score = tl.dot(q, k.T, input_precision="ieee")
    if SOFTCAP:
        # c * tanh(s / c), by way of the logistic function.
        score = softcap * (2.0 * tl.sigmoid(score * (2.0 * softmax_scale / softcap)) - 1.0) * LOG2E
    else:
        score = score * (softmax_scale * LOG2E)
    if MASK:
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] <= position[:, None])
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    # A row that has met no visible key yet: shift by 0 so that -inf stays -inf instead of NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    keep = tl.exp2(best - shift)
    weight = tl.exp2(score - shift[:, None])
    acc = tl.dot(weight.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return higher, total * keep + tl.sum(weight, 1), acc


@triton.jit
def first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a query at `position` sees: of the last WINDOW, of its own CHUNK, or of all."""
    begin = position * 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, begin)
    if CHUNK > 0:
        begin = tl.maximum(position // CHUNK * CHUNK, begin)
    return begin


@triton.jit
def heads_attention(
    q_ptr, cache_ptr, pages_ptr, q_start_ptr, length_ptr, sink_ptr, out_ptr, lse_ptr,
    q_row, q_head, softmax_scale, softcap, max_pages, splits, ROWS,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Causal attention of sequences whose queries are the last of their cached positions.

    q[Tq, HEADS, D] at distances of its own; cache rows [KV_HEADS, D] keys, then [KV_HEADS, DV] values;
    pages[B, max_pages]; q_start[B+1]; length[B] counts the keys including the new ones; sink[HEADS] joins each head's
    softmax as the score of a key without value. -> out[Tq, HEADS, DV]; with SPLIT, where every sequence has ROWS
    queries times heads, one share of the keys: out[B, splits, ROWS, DV] and lse[B, splits, ROWS] in float32.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(2) // splits
    share = tl.program_id(2) % splits
    q_start = tl.load(q_start_ptr + sequence).to(tl.int64)
    queries = (tl.load(q_start_ptr + sequence + 1) - q_start).to(tl.int32)
    length = tl.load(length_ptr + sequence)
    rows = queries * GROUP
    # Later blocks have more keys to visit: they start first, and the short ones fill the gaps at the end.
    block = tl.cdiv(rows, BM) - 1 - tl.program_id(0)
    if block >= 0:
        row = block * BM + tl.arange(0, BM)
        real = row < rows
        row = tl.where(real, row, 0)
        query = row // GROUP
        head = tl.program_id(1) * GROUP + row % GROUP
        position = length - queries + query
        begin = first_key(position, WINDOW, CHUNK)
        lowest = length - queries + block * BM // GROUP
        highest = length - queries + (tl.minimum(block * BM + BM, rows) - 1) // GROUP
        low = first_key(lowest, WINDOW, CHUNK) // BN
        high = tl.cdiv(highest + 1, BN)
        if SPLIT:
            per_share = tl.cdiv(high - low, splits)
            low += share * per_share
            high = tl.minimum(low + per_share, high)
        rd = tl.arange(0, D2)
        rv = tl.arange(0, DV2)
        q_at = q_ptr + (q_start + query)[:, None] * q_row + head[:, None] * q_head + rd[None, :]
        q = tl.load(q_at, mask=(rd < D)[None, :], other=0.0)
        best = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        if SINKS:
            best = tl.where(share == 0, tl.load(sink_ptr + head).to(tl.float32) * LOG2E, best)
            total = tl.where(share == 0, 1.0, total)
        acc = tl.zeros((BM, DV2), dtype=tl.float32)
        page_ptr = pages_ptr + sequence * max_pages
        # Blocks that every row sees whole need no mask; those of a short decode step are not worth a second loop.
        whole = low
        after = low
        if not SPLIT:
            whole = tl.minimum(tl.maximum(tl.cdiv(first_key(highest, WINDOW, CHUNK), BN), low), high)
            after = tl.maximum(whole, (lowest + 1) // BN)
            if WINDOW > 0 or CHUNK > 0:
                for number in range(low, whole):
                    best, total, acc = heads_step(
                        q, best, total, acc, cache_ptr, page_ptr, number * BN, begin, position, length, softmax_scale,
                        softcap, KV_HEADS, D, D2, DV, DV2, PAGE, SOFTCAP, BN, True,
                    )  # fmt: skip
            for number in range(whole, after):
                best, total, acc = heads_step(
                    q, best, total, acc, cache_ptr, page_ptr, number * BN, begin, position, length, softmax_scale,
                    softcap, KV_HEADS, D, D2, DV, DV2, PAGE, SOFTCAP, BN, False,
                )  # fmt: skip
        for number in range(after, high):
            best, total, acc = heads_step(
                q, best, total, acc, cache_ptr, page_ptr, number * BN, begin, position, length, softmax_scale,
                softcap, KV_HEADS, D, D2, DV, DV2, PAGE, SOFTCAP, BN, True,
            )  # fmt: skip
        seen = total > 0.0
        divisor = tl.where(seen, total, 1.0)
        store = real[:, None] & (rv < DV)[None, :]
        if SPLIT:
            to = (sequence.to(tl.int64) * splits + share) * ROWS + query * HEADS + head
            lse = tl.where(seen, best + tl.log2(divisor), float("-inf"))
            tl.store(lse_ptr + to, lse, mask=real)
        else:
            to = (q_start + query) * HEADS + head
        out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to[:, None] * DV + rv[None, :], out, mask=store)
