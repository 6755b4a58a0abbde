# mypy: ignore-errors
"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1): absorbed decode over the paged latent cache,
and prefill over up-projected keys and values.

Softmax runs in base 2; a log-sum-exp is therefore a base-2 logarithm.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_latent(
    latent_ptr,
    scale_ptr,
    slot,
    inside,
    DV: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    TO: tl.constexpr,
):
    """Latent [BN, DV] of the cache rows `slot[BN]` in TO; an FP8 cache is widened with its scale for every 128."""
    at = latent_ptr + slot[:, None] * LATENT_ROW + tl.arange(0, DV)[None, :]
    latent = tl.load(at, mask=inside[:, None], other=0.0)
    if SCALE_ROW > 0:
        BN: tl.constexpr = slot.shape[0]
        G: tl.constexpr = DV // 128
        scale_at = scale_ptr + slot[:, None] * SCALE_ROW + tl.arange(0, G)[None, :]
        scale = tl.load(scale_at, mask=inside[:, None], other=0)
        if scale.dtype == tl.uint8:
            scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        grouped = tl.reshape(latent.to(tl.float32), (BN, G, 128))
        latent = tl.reshape(grouped * scale[:, :, None], (BN, DV)).to(TO)
    return latent


@triton.jit
def mla_decode_split(
    q_ptr, q_rope_ptr, latent_ptr, rope_ptr, scale_ptr, pages_ptr, length_ptr, seq_ptr, chosen_ptr,
    partial_ptr, lse_ptr, q_row, q_head, q_rope_row, q_rope_head, softmax_scale, max_pages, splits, QUERIES, ROWS,
    HEADS: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, PAGE: tl.constexpr,
    LATENT_ROW: tl.constexpr, ROPE_ROW: tl.constexpr, SCALE_ROW: tl.constexpr, TOP: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Absorbed attention of one share of the keys.

    q[B*QUERIES, HEADS, DV] and q_rope[B*QUERIES, HEADS, DR] at distances of their own between tokens and heads; latent,
    rope and scale open the same cache rows likewise (in elements); pages[B, max_pages]; length[B] counts the keys
    including those of the QUERIES new tokens, and query i sees the first `length - QUERIES + 1 + i`. ROWS is
    QUERIES*HEADS.
    -> partial[B, splits, ROWS, DV], lse[B, splits, ROWS] in float32, lse -inf for a share without keys. SCALE_ROW = 0
    marks a cache that is not quantised.

    With TOP every token attends to positions of its own, chosen[B, TOP] (DeepSeek-V3.2, arXiv 2512.02556): B counts
    tokens then, seq[B] names their sequences, length[B] is their position, and QUERIES is 1.
    """
    b = tl.program_id(0)
    share = tl.program_id(2)
    row = tl.program_id(1) * BH + tl.arange(0, BH)
    real = row < ROWS
    rv = tl.arange(0, DV)
    rr = tl.arange(0, DR)
    n = tl.load(length_ptr + b)
    sequence = b
    if TOP > 0:
        n = tl.minimum(n + 1, TOP)
        sequence = tl.load(seq_ptr + b)
    limit = n - QUERIES + 1 + tl.where(real, row, 0) // HEADS
    blocks = tl.cdiv(n, BN)
    per_share = tl.cdiv(blocks, splits)
    low = share * per_share
    high = tl.minimum(low + per_share, blocks)
    token = (b.to(tl.int64) * QUERIES + tl.where(real, row, 0) // HEADS)[:, None]
    head = (tl.where(real, row, 0) % HEADS)[:, None]
    q_latent = tl.load(q_ptr + token * q_row + head * q_head + rv[None, :])
    q_rope = tl.load(q_rope_ptr + token * q_rope_row + head * q_rope_head + rr[None, :])
    best = tl.full((BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    acc = tl.zeros((BH, DV), dtype=tl.float32)
    for block in range(low, high):
        key = block * BN + tl.arange(0, BN)
        inside = key < n
        if TOP > 0:
            position = tl.load(chosen_ptr + b.to(tl.int64) * TOP + key, mask=inside, other=0)
            page = tl.load(pages_ptr + sequence * max_pages + position // PAGE)
            slot = page.to(tl.int64) * PAGE + position % PAGE
        else:
            page = tl.load(pages_ptr + sequence * max_pages + (block * BN) // PAGE)
            slot = page.to(tl.int64) * PAGE + key % PAGE
        latent = load_latent(latent_ptr, scale_ptr, slot, inside, DV, LATENT_ROW, SCALE_ROW, q_ptr.dtype.element_ty)
        rope = tl.load(rope_ptr + slot[:, None] * ROPE_ROW + rr[None, :], mask=inside[:, None], other=0.0)
        rope = rope.to(q_rope.dtype)
        score = tl.dot(q_latent, latent.T, input_precision="ieee")
        score = tl.dot(q_rope, rope.T, score, input_precision="ieee") * (softmax_scale * LOG2E)
        score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        # A row that has met no visible key yet: shift by 0 so that -inf stays -inf instead of NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        keep = tl.exp2(best - shift)
        weight = tl.exp2(score - shift[:, None])
        total = total * keep + tl.sum(weight, 1)
        acc = tl.dot(weight.to(latent.dtype), latent, acc * keep[:, None], input_precision="ieee")
        best = higher
    seen = total > 0.0
    divisor = tl.where(seen, total, 1.0)
    lse = tl.where(seen, best + tl.log2(divisor), float("-inf"))
    out = (b.to(tl.int64) * splits + share) * ROWS + row
    tl.store(partial_ptr + out[:, None] * DV + rv[None, :], acc / divisor[:, None], mask=real[:, None])
    tl.store(lse_ptr + out, lse, mask=real)


@triton.jit
def mla_decode_combine(partial_ptr, lse_ptr, out_ptr, splits, ROWS, DV: tl.constexpr, DV2: tl.constexpr):
    """partial[B, splits, ROWS, DV] and lse[B, splits, ROWS] -> out[B, ROWS, DV]: the shares weighted by their sums."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    rv = tl.arange(0, DV2)
    inside = rv < DV
    best = tl.load(lse_ptr + b * splits * ROWS + row)
    for share in range(1, splits):
        best = tl.maximum(best, tl.load(lse_ptr + (b * splits + share) * ROWS + row))
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = 0.0
    acc = tl.zeros((DV2,), dtype=tl.float32)
    for share in range(splits):
        at = (b * splits + share) * ROWS + row
        weight = tl.exp2(tl.load(lse_ptr + at) - shift)
        acc += weight * tl.load(partial_ptr + at * DV + rv, mask=inside, other=0.0)
        total += weight
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + (b * ROWS + row) * DV + rv, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cache_read(
    latent_ptr, rope_ptr, scale_ptr, pages_ptr, start_ptr, latent_out_ptr, rope_out_ptr, max_pages,
    DV: tl.constexpr, DR: tl.constexpr, PAGE: tl.constexpr,
    LATENT_ROW: tl.constexpr, ROPE_ROW: tl.constexpr, SCALE_ROW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sequence b of the paged cache -> rows start[b]..start[b+1] of latent_out[S, DV] and rope_out[S, DR]."""
    b = tl.program_id(1)
    start = tl.load(start_ptr + b).to(tl.int64)
    n = (tl.load(start_ptr + b + 1) - start).to(tl.int32)
    first = tl.program_id(0) * BN
    if first < n:
        key = first + tl.arange(0, BN)
        inside = key < n
        page = tl.load(pages_ptr + b * max_pages + first // PAGE)
        slot = page.to(tl.int64) * PAGE + key % PAGE
        rv = tl.arange(0, DV)
        rr = tl.arange(0, DR)
        to = latent_out_ptr.dtype.element_ty
        latent = load_latent(latent_ptr, scale_ptr, slot, inside, DV, LATENT_ROW, SCALE_ROW, to)
        rope = tl.load(rope_ptr + slot[:, None] * ROPE_ROW + rr[None, :], mask=inside[:, None], other=0.0)
        tl.store(latent_out_ptr + (start + key)[:, None] * DV + rv[None, :], latent, mask=inside[:, None])
        tl.store(rope_out_ptr + (start + key)[:, None] * DR + rr[None, :], rope, mask=inside[:, None])


@triton.jit
def prefill_step(
    q_nope, q_rope, best, total, acc, kv_at, rope_at, position, first, keys, softmax_scale,
    KV_ROW: tl.constexpr, ROPE_ROW: tl.constexpr, DN: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of BN keys of the online softmax; without MASK every key is known to be visible to every query."""
    key = first + tl.arange(0, BN)
    inside = key < keys
    slot = tl.where(inside, key, 0)[:, None]
    k_nope = tl.load(kv_at + slot * KV_ROW + tl.arange(0, DN)[None, :])
    k_rope = tl.load(rope_at + slot * ROPE_ROW + tl.arange(0, DR)[None, :])
    score = tl.dot(q_nope, k_nope.T, input_precision="ieee")
    score = tl.dot(q_rope, k_rope.T, score, input_precision="ieee") * (softmax_scale * LOG2E)
    if MASK:
        score = tl.where((key[None, :] <= position[:, None]) & inside[None, :], score, float("-inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    keep = tl.exp2(best - shift)
    weight = tl.exp2(score - shift[:, None])
    value = tl.load(kv_at + slot * KV_ROW + DN + tl.arange(0, DV)[None, :])
    acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
    return higher, total * keep + tl.sum(weight, 1), acc


@triton.jit
def mla_prefill(
    q_ptr, kv_ptr, rope_ptr, q_start_ptr, k_start_ptr, out_ptr, q_row, softmax_scale,
    HEADS: tl.constexpr, DN: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Causal attention of ragged sequences whose keys may begin before their queries (a cached prefix).

    q[Tq, HEADS, DN+DR] at distance `q_row` between tokens; kv[Tk, HEADS, DN+DV] as the up-projection leaves it, keys
    beside values; rope[Tk, DR] shared by the heads; q_start[B+1], k_start[B+1] -> out[Tq, HEADS, DV]. The last query of
    a sequence sees all its keys.
    """
    sequence = tl.program_id(2)
    head = tl.program_id(1)
    q_start = tl.load(q_start_ptr + sequence).to(tl.int64)
    queries = (tl.load(q_start_ptr + sequence + 1) - q_start).to(tl.int32)
    k_start = tl.load(k_start_ptr + sequence).to(tl.int64)
    keys = (tl.load(k_start_ptr + sequence + 1) - k_start).to(tl.int32)
    # Later blocks have more keys to visit: they start first, and the short ones fill the gaps at the end.
    block = tl.cdiv(queries, BM) - 1 - tl.program_id(0)
    if block >= 0:
        KV_ROW: tl.constexpr = HEADS * (DN + DV)
        rm = block * BM + tl.arange(0, BM)
        real = rm < queries
        position = keys - queries + rm
        q_at = q_ptr + ((q_start + tl.where(real, rm, 0)) * q_row + head * (DN + DR))[:, None]
        q_nope = tl.load(q_at + tl.arange(0, DN)[None, :])
        q_rope = tl.load(q_at + DN + tl.arange(0, DR)[None, :])
        kv_at = kv_ptr + k_start * KV_ROW + head * (DN + DV)
        rope_at = rope_ptr + k_start * DR
        best = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        acc = tl.zeros((BM, DV), dtype=tl.float32)
        first_position = keys - queries + block * BM
        whole = (first_position + 1) // BN * BN
        end = tl.minimum(first_position + BM, keys)
        for first in range(0, whole, BN):
            best, total, acc = prefill_step(
                q_nope, q_rope, best, total, acc, kv_at, rope_at, position, first, keys, softmax_scale,
                KV_ROW, DR, DN, DV, DR, BN, False,
            )  # fmt: skip
        for first in range(whole, end, BN):
            best, total, acc = prefill_step(
                q_nope, q_rope, best, total, acc, kv_at, rope_at, position, first, keys, softmax_scale,
                KV_ROW, DR, DN, DV, DR, BN, True,
            )  # fmt: skip
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        o_at = out_ptr + ((q_start + rm) * HEADS + head)[:, None] * DV + tl.arange(0, DV)[None, :]
        tl.store(o_at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])
