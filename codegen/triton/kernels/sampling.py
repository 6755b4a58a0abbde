# mypy: ignore-errors
"""The next token from the logits, which stay on the device: the largest, or a draw from the most probable ones.

The same rule as `runtime/sampling.py`: top-k, of these the smallest set with mass top_p, of these what has min_p of the
greatest probability; the draw is the n-th number of the row's key (Philox 4x32-10), and takes the token at that share
of the kept mass in order of index. Where tokens are as likely as the last one kept, the first of them are kept.
"""

import triton
import triton.language as tl


@triton.jit
def term(logit_ptr, row, V, column, top, inverse):
    """`exp((x - top) * inverse)`, the unnormalised probability, and its bits, which order it."""
    x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
    p = tl.exp((x - top) * inverse)
    return p, p.to(tl.int32, bitcast=True)


@triton.jit
def above(logit_ptr, row, V, top, inverse, edge, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many terms of a row lie above `edge` (bits), or their sum."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        p, bits = term(logit_ptr, row, V, column, top, inverse)
        if COUNT:
            p = tl.full((BLOCK,), 1.0, tl.float32)
        total += tl.where((bits > edge) & (column < V), p, 0.0)
    return tl.sum(total, 0)


@triton.jit
def cut(logit_ptr, row, V, top, inverse, needed, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bits whose terms, with all larger ones, number `needed` or sum to it. No sort: three bits a pass."""
    digit = tl.arange(0, 8)
    low = tl.full((), 0, tl.int32)
    for step in range(10):
        shift = 27 - 3 * step
        edge = low + (digit << shift)
        reach = tl.zeros((8,), dtype=tl.float32)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            p, bits = term(logit_ptr, row, V, column, top, inverse)
            if COUNT:
                p = tl.full((BLOCK,), 1.0, tl.float32)
            held = (bits[:, None] >= edge[None, :]) & (column < V)[:, None]
            reach += tl.sum(tl.where(held, p[:, None], 0.0), 0)
        low += tl.sum(((reach >= needed) & (digit > 0)).to(tl.int32), 0) << shift
    return low


@triton.jit
def draw(
    logit_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, key_ptr, number_ptr, token_ptr, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """logits[T, V] and each row's options -> token[T]; temperature 0 takes the largest, the lowest index of equals.

    key[T] are 64-bit keys, number[T] how many numbers of each were drawn before.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        largest = tl.max(x, 0)
        token = tl.where(largest > top, first + tl.argmax(x, 0), token)
        top = tl.maximum(top, largest)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        # Beside a temperature next to 0 the largest alone counts, and 0 times infinity would be no number.
        inverse = 1.0 / tl.maximum(temperature, 1e-30)
        k = tl.load(top_k_ptr + row)
        share = tl.load(top_p_ptr + row)
        # Terms above `low` are kept, and the first `equals` of those at it.
        low = tl.full((), 0, tl.int32)
        equals = tl.full((), 0x7FFFFFFF, tl.int32)
        limited = (k > 0) & (k < V)
        if limited:
            low = cut(logit_ptr, row, V, top, inverse, k.to(tl.float32), True, BLOCK)
            equals = k - above(logit_ptr, row, V, top, inverse, low, True, BLOCK).to(tl.int32)
        if share < 1.0:
            total = above(logit_ptr, row, V, top, inverse, low, False, BLOCK)
            if limited:
                total += equals.to(tl.float32) * low.to(tl.float32, bitcast=True)
            needed = total * share
            edge = tl.maximum(cut(logit_ptr, row, V, top, inverse, needed, False, BLOCK), low)
            left = needed - above(logit_ptr, row, V, top, inverse, edge, False, BLOCK)
            fit = tl.ceil(left / tl.maximum(edge.to(tl.float32, bitcast=True), 1e-37))
            few = tl.maximum(tl.minimum(fit, 2.0e9).to(tl.int32), 1)
            equals = tl.where(edge > low, few, tl.minimum(equals, few))
            low = edge
        least = tl.load(min_p_ptr + row).to(tl.int32, bitcast=True)
        equals = tl.where(least > low, 0x7FFFFFFF, equals)
        low = tl.maximum(low, least)
        mass = tl.full((), 0.0, tl.float32)
        seen = tl.full((), 0, tl.int32)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            p, bits = term(logit_ptr, row, V, column, top, inverse)
            at = (bits == low) & (column < V)
            place = seen + tl.cumsum(at.to(tl.int32), 0)
            kept = (column < V) & ((bits > low) | (at & (place <= equals)))
            mass += tl.sum(tl.where(kept, p, 0.0), 0)
            seen += tl.sum(at.to(tl.int32), 0)
        word = tl.randint(tl.load(key_ptr + row), tl.load(number_ptr + row))
        uniform = ((word.to(tl.int64) & 0xFFFFFFFF) >> 8).to(tl.float32) * 5.9604644775390625e-08
        target = mass * uniform
        before = tl.full((), 0.0, tl.float32)
        seen = tl.full((), 0, tl.int32)
        found = tl.full((), -1, tl.int32)
        last = token
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            p, bits = term(logit_ptr, row, V, column, top, inverse)
            at = (bits == low) & (column < V)
            place = seen + tl.cumsum(at.to(tl.int32), 0)
            kept = (column < V) & ((bits > low) | (at & (place <= equals))) & (p > 0.0)
            reach = before + tl.cumsum(tl.where(kept, p, 0.0), 0)
            here = tl.min(tl.where(kept & (reach > target), column, 0x7FFFFFFF), 0)
            found = tl.where((found < 0) & (here < 0x7FFFFFFF), here, found)
            final = tl.max(tl.where(kept, column, -1), 0)
            last = tl.where(final >= 0, final, last)
            before += tl.sum(tl.where(kept, p, 0.0), 0)
            seen += tl.sum(at.to(tl.int32), 0)
        # Rounding may leave the target at the very end of the kept mass: the last kept token is meant.
        token = tl.where(found < 0, last, found)
    tl.store(token_ptr + row, token)
