# mypy: ignore-errors
"""Expert choice, the permutation of tokens to experts, and its inverse with the routing weights.

Group-limited top-k with a bias that steers the choice but not the weight: DeepSeek-V3 technical report
(arXiv 2412.19437, sec. 2.1.2); its softmax form without bias is DeepSeek-V2's.
"""

import triton
import triton.language as tl


@triton.jit
def route(
    logit_ptr, bias_ptr, index_ptr, weight_ptr, count_ptr, T, route_scale,
    E: tl.constexpr, NG: tl.constexpr, NG2: tl.constexpr, GS2: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K2: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr, PAIR_SCORE: tl.constexpr,
    NORMALISE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """logits[T, E] -> index[T, TOP_K] by falling score, weight[T, TOP_K]; adds each expert's tokens to count[E].

    A group's score is the sum of its two best (PAIR_SCORE) or its best. Equal scores go to the lower index. NG2 and
    GS2 are powers of two of at least NG groups and E/NG experts; `count` starts at zero.
    """
    GS: tl.constexpr = E // NG
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    rg = tl.arange(0, NG2)
    rs = tl.arange(0, GS2)
    expert = rg[:, None] * GS + rs[None, :]
    real = (rg < NG)[:, None] & (rs < GS)[None, :]
    inside = (t < T)[:, None, None] & real[None, :, :]
    logit = tl.load(logit_ptr + t[:, None, None].to(tl.int64) * E + expert[None, :, :], mask=inside, other=0.0)
    logit = logit.to(tl.float32)
    if SOFTMAX:
        logit = tl.where(real[None, :, :], logit, float("-inf"))
        top = tl.max(tl.max(logit, 2), 1)
        e = tl.exp(logit - top[:, None, None])
        score = e / tl.sum(tl.sum(e, 2), 1)[:, None, None]
    else:
        score = tl.sigmoid(logit)
    choice = score
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :, :]
    choice = tl.where(real[None, :, :], choice, float("-inf"))
    if TOP_GROUPS < NG:
        group = tl.max(choice, 2)
        if PAIR_SCORE:
            best = tl.argmax(choice, 2)
            group += tl.max(tl.where(rs[None, None, :] == best[:, :, None], float("-inf"), choice), 2)
        kept = tl.zeros((BT, NG2), dtype=tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            hit = rg[None, :] == tl.argmax(group, 1)[:, None]
            kept = tl.where(hit, 1, kept)
            group = tl.where(hit, float("-inf"), group)
        choice = tl.where(kept[:, :, None] != 0, choice, float("-inf"))
    choice = tl.reshape(choice, (BT, NG2 * GS2))
    score = tl.reshape(score, (BT, NG2 * GS2))
    flat = tl.arange(0, NG2 * GS2)
    rk = tl.arange(0, TOP_K2)
    index = tl.zeros((BT, TOP_K2), dtype=tl.int32)
    weight = tl.zeros((BT, TOP_K2), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.argmax(choice, 1)
        hit = flat[None, :] == at[:, None]
        chosen = tl.sum(tl.where(hit, score, 0.0), 1)
        choice = tl.where(hit, float("-inf"), choice)
        index = tl.where((rk == k)[None, :], ((at // GS2) * GS + at % GS2)[:, None], index)
        weight = tl.where((rk == k)[None, :], chosen[:, None], weight)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1)[:, None] + 1e-20)
    out = t[:, None].to(tl.int64) * TOP_K + rk[None, :]
    store = (t < T)[:, None] & (rk < TOP_K)[None, :]
    tl.store(index_ptr + out, index, mask=store)
    tl.store(weight_ptr + out, weight * route_scale, mask=store)
    tl.atomic_add(count_ptr + index, tl.full((BT, TOP_K2), 1, tl.int32), mask=store)


@triton.jit
def sparsemixer(
    logit_ptr, index_ptr, weight_ptr, count_ptr, T, route_scale, jitter,
    E: tl.constexpr, E2: tl.constexpr, TOP_K: tl.constexpr, TOP_K2: tl.constexpr, NORMALISE: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """logits[T, E] -> index, weight[T, TOP_K]; one expert after the other (Liu et al., arXiv 2409.12136, at inference).

    The weight of each is its softmax among the experts not chosen before whose logit is within `2 * jitter`,
    relatively, of the best; adds each expert's tokens to count[E].
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.arange(0, E2)
    real = (t < T)[:, None] & (expert < E)[None, :]
    logit = tl.load(logit_ptr + t[:, None].to(tl.int64) * E + expert[None, :], mask=real, other=float("-inf"))
    left = logit
    rk = tl.arange(0, TOP_K2)
    index = tl.zeros((BT, TOP_K2), dtype=tl.int32)
    weight = tl.zeros((BT, TOP_K2), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(left, 1)[:, None]
        at = tl.argmax(left, 1)[:, None]
        near = (best - logit) <= 2.0 * jitter * tl.maximum(tl.abs(logit), best)
        share = tl.where(near & (left > float("-inf")), tl.exp(left - best), 0.0)
        weight = tl.where((rk == k)[None, :], 1.0 / tl.sum(share, 1)[:, None], weight)
        index = tl.where((rk == k)[None, :], at, index)
        left = tl.where(expert[None, :] == at, float("-inf"), left)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1)[:, None] + 1e-20)
    out = t[:, None].to(tl.int64) * TOP_K + rk[None, :]
    store = (t < T)[:, None] & (rk < TOP_K)[None, :]
    tl.store(index_ptr + out, index, mask=store)
    tl.store(weight_ptr + out, weight * route_scale, mask=store)
    tl.atomic_add(count_ptr + index, tl.full((BT, TOP_K2), 1, tl.int32), mask=store)


@triton.jit
def permutation(
    index_ptr, count_ptr, slot_ptr, source_ptr, block_expert_ptr, PAIRS, ROWS, capacity,
    E: tl.constexpr, E2: tl.constexpr, TOP_K: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """index[PAIRS = T*TOP_K], count[E] -> the row of every pair, and the token of every row; one program an expert.

    slot[PAIRS] is the row of the expert-sorted activations (-1 for an expert outside 0..E-1), source[ROWS] the token
    of each row (-1: padding). Within an expert, rows keep the order of the tokens. Contiguous layout: experts are
    padded to ALIGN rows and block_expert[ROWS/ALIGN] is written (-1 past the last). ALIGN 0: e starts at e * capacity.
    """
    e = tl.program_id(0)
    experts = tl.arange(0, E2)
    count = tl.load(count_ptr + experts, mask=experts < E, other=0)
    own = tl.sum(tl.where(experts == e, count, 0), 0)
    if ALIGN == 0:
        start = e * capacity
        end = start + capacity
    else:
        padded = tl.cdiv(count, ALIGN) * ALIGN
        start = tl.sum(tl.where(experts < e, padded, 0), 0)
        end = start + tl.cdiv(own, ALIGN) * ALIGN
        for block in range(start // ALIGN, end // ALIGN):
            tl.store(block_expert_ptr + block, e)
        if e == E - 1:
            for block in range(end // ALIGN, ROWS // ALIGN):
                tl.store(block_expert_ptr + block, -1)
            end = ROWS
    ri = tl.arange(0, BLOCK)
    row = start
    for first in range(0, PAIRS, BLOCK):
        pair = first + ri
        expert = tl.load(index_ptr + pair, mask=pair < PAIRS, other=-1)
        hit = (expert == e) & (pair < PAIRS)
        at = row + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(slot_ptr + pair, at, mask=hit)
        tl.store(source_ptr + at, pair // TOP_K, mask=hit)
        if e == 0:
            outside = ((expert < 0) | (expert >= E)) & (pair < PAIRS)
            tl.store(slot_ptr + pair, tl.full((BLOCK,), -1, tl.int32), mask=outside)
        row += tl.sum(hit.to(tl.int32), 0)
    for first in range(start + own, end, BLOCK):
        at = first + ri
        tl.store(source_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=at < end)


@triton.jit
def permute(x_ptr, scale_ptr, source_ptr, y_ptr, y_scale_ptr, D, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    """y[r] = x[source[r]], and with SCALED the row's 1x128 scales; rows with a negative source stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(source_ptr + row).to(tl.int64)
    if token >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0)
        tl.store(y_ptr + row * D + column, x, mask=column < D)
        if SCALED:
            groups = tl.cdiv(D, 128)
            group = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
            scale = tl.load(scale_ptr + token * groups + group, mask=group < groups, other=0.0)
            tl.store(y_scale_ptr + row * groups + group, scale, mask=group < groups)


@triton.jit
def unpermute(
    x_ptr, slot_ptr, weight_ptr, shared_ptr, y_ptr, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr
):
    """y[t] = sum over k of weight[t, k] * x[slot[t, k]], plus shared[t] with SHARED; summed in float32 by rising k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(slot_ptr + token * TOP_K + k).to(tl.int64)
        x = tl.load(x_ptr + row * D + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        acc += tl.load(weight_ptr + token * TOP_K + k) * x
    if SHARED:
        acc += tl.load(shared_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * D + column, acc.to(y_ptr.dtype.element_ty), mask=inside)
