# mypy: ignore-errors
"""Main loops of matrix products: float32 tiles [BM, BN] of rows of A times rows of B.

An operand comes as pointers to the first elements of its rows, or with TMA as a tensor descriptor of [rows, K] whose
boxes are BM (BN) rows by BK columns, and the first row of the tile. `a_scale_row[BM]` points to the first scales of A's
rows, `b_scale_row` to those of B: one pointer where all columns of the tile lie under one row of scales, else one for
each, [1, BN]. Without scales of A, FP8 rows of B are widened to A's type; without scales of B both are multiplied as
they are. Block scales are one for 1x128 of A and for 128x128 of B, and BK is 128 then. The tensor core's own FP8
accumulation keeps about 14 bits, so the partial sum of every 128 products is scaled and added in float32 (DeepSeek-V3
technical report, arXiv 2412.19437, sec. 3.3.2). WS asks for warps of their own for the loads. A *pair* is two products
of the same rows of A (gate and up) in one pass over them.
"""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import load_scale, widen


@triton.jit
def load_rows(source, first, k, step, K, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr):
    """Columns `k..k+BK` of an operand's rows, [rows, BK]; `step`: elements from one column to the next."""
    if TMA:
        x = source.load([first, k])
    else:
        column = k + tl.arange(0, BK)
        at = source[:, None] + column[None, :] * step
        x = tl.load(at) if EVEN_K else tl.load(at, mask=(column < K)[None, :], other=0.0)
    return x


@triton.jit
def added(acc, a, b, a_scale, b_scale):
    """`acc` plus the product of `a` with the transpose of `b`, scaled."""
    if b_scale is None:
        if a.dtype == b.dtype:
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32).T, acc, input_precision="ieee")
    elif a_scale is None:
        acc += tl.dot(a, widen(b, a.dtype).T, input_precision="ieee") * b_scale
    else:
        acc += tl.dot(a, b.T, max_num_imprecise_acc=128) * (a_scale * b_scale)
    return acc


@triton.jit
def product_rows(
    a_from, a_first, a_scale_row, b_from, b_first, b_step, b_scale_row, scale_step, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """One product. `b_step`: B's elements from one of K to the next; `scale_step`: its scales from 128 to the next."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(K, BK), warp_specialize=WS):
        a = load_rows(a_from, a_first, block * BK, 1, K, BK, EVEN_K, A_TMA)
        b = load_rows(b_from, b_first, block * BK, b_step, K, BK, EVEN_K, B_TMA)
        a_scale = None if a_scale_row is None else load_scale(a_scale_row + block)[:, None]
        b_scale = None if b_scale_row is None else load_scale(b_scale_row + block * scale_step)
        acc = added(acc, a, b, a_scale, b_scale)
    return acc


@triton.jit
def scale_of_two(row, following, first, block):
    """Scales at `row`, or where the tile reaches into the next block of rows, of the columns `first` and of the others.

    Two numbers for a tile: a pointer for each of its columns would take more registers than there are.
    """
    scale = load_scale(row + block)
    if first is not None:
        scale = tl.where(first, scale, load_scale(following + block))
    return scale


@triton.jit
def product_pair(
    a_from, a_first, a_scale_row, gate_from, gate_first, gate_scale_row, up_from, up_first, up_scale_row,
    up_scale_next, up_in_first, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Two products of the same rows of A; `up_in_first`: see `scale_of_two`."""
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(K, BK), warp_specialize=WS):
        a = load_rows(a_from, a_first, block * BK, 1, K, BK, EVEN_K, A_TMA)
        b_gate = load_rows(gate_from, gate_first, block * BK, 1, K, BK, EVEN_K, B_TMA)
        b_up = load_rows(up_from, up_first, block * BK, 1, K, BK, EVEN_K, B_TMA)
        a_scale = None if a_scale_row is None else load_scale(a_scale_row + block)[:, None]
        gate_scale = None if gate_scale_row is None else load_scale(gate_scale_row + block)
        up_scale = None if up_scale_row is None else scale_of_two(up_scale_row, up_scale_next, up_in_first, block)
        gate = added(gate, a, b_gate, a_scale, gate_scale)
        up = added(up, a, b_up, a_scale, up_scale)
    return gate, up
