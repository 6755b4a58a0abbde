# mypy: ignore-errors
"""The next token from the logits: the largest, or a draw from the smallest set of tokens that holds mass top_p."""

import triton
import triton.language as tl


@triton.jit
def greedy(logit_ptr, token_ptr, V, BLOCK: tl.constexpr):
    """logits[T, V] -> token[T]: the index of the largest, the lowest of equals."""
    row = tl.program_id(0).to(tl.int64)
    best = float("-inf")
    token = 0
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top = tl.max(x, 0)
        at = tl.argmax(x, 0)
        token = tl.where(top > best, first + at, token)
        best = tl.maximum(best, top)
    tl.store(token_ptr + row, token)


@triton.jit
def mass_at_or_above(logit_ptr, row, V, top, inverse, threshold, BLOCK: tl.constexpr):
    """Sum over a row of `exp((x - top) * inverse)` for the terms whose bits, as an integer, reach `threshold`."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        p = tl.exp((x - top) * inverse)
        total += tl.where(p.to(tl.int32, bitcast=True) >= threshold, p, 0.0)
    return tl.sum(total, 0)


@triton.jit
def top_p(logit_ptr, temperature_ptr, top_p_ptr, uniform_ptr, token_ptr, V, BLOCK: tl.constexpr):
    """logits[T, V], temperature[T] > 0, top_p[T] in (0, 1], uniform[T] in [0, 1) -> token[T].

    Keeps every token at least as likely as the last one needed for mass top_p (equals stay together), then takes the
    token at `uniform` of the kept mass in order of index. The cut is found by bisection on the bits of the
    unnormalised probabilities, which order non-negative floats: no sort, and 31 passes over a row that L2 holds.
    """
    row = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / tl.load(temperature_ptr + row)
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x, 0))
    needed = mass_at_or_above(logit_ptr, row, V, top, inverse, 0, BLOCK) * tl.load(top_p_ptr + row)
    # The largest threshold that still holds the mass; 1.0 (0x3F800000) is the likeliest token's term.
    low = 0
    high = 0x3F800001
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = mass_at_or_above(logit_ptr, row, V, top, inverse, middle, BLOCK) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    target = mass_at_or_above(logit_ptr, row, V, top, inverse, low, BLOCK) * tl.load(uniform_ptr + row)
    before = tl.full((), 0.0, tl.float32)
    token = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        p = tl.exp((x - top) * inverse)
        kept = (p.to(tl.int32, bitcast=True) >= low) & (column < V) & (p > 0.0)
        mass = before + tl.cumsum(tl.where(kept, p, 0.0), 0)
        hit = kept & (mass > target)
        here = tl.min(tl.where(hit, column, 0x7FFFFFFF), 0)
        token = tl.where((token < 0) & (here < 0x7FFFFFFF), here, token)
        last = tl.maximum(last, tl.max(tl.where(kept, column, 0), 0))
        before += tl.sum(tl.where(kept, p, 0.0), 0)
    # Rounding may leave the target at the very end of the kept mass: the last kept token is meant.
    tl.store(token_ptr + row, tl.where(token < 0, last, token))
