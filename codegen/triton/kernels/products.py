# mypy: ignore-errors
"""Main loops of matrix products: float32 tiles [BM, BN] of rows of A times rows of B.

`a_row[BM]` and `b_row[BN]` point to the rows' first elements, `a_scale_row[BM]` to the first scales of A's rows.
`b_scale_row` is one pointer where all columns of the tile lie under one row of B's scales, else one for each column,
[1, BN]. The FP8 loops carry one scale for 1x128 of A and one for 128x128 of B. The tensor core's own accumulation keeps
about 14 bits, so the partial sum of every 128 products is scaled and added in float32 (DeepSeek-V3 technical report,
arXiv 2412.19437, sec. 3.3.2). A *pair* is two products of the same rows of A (gate and up) in one pass over them.
"""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import load_scale, widen


@triton.jit
def load_part(at, inside, WHOLE: tl.constexpr):
    """A part of rows; with WHOLE all of it exists, and the load needs no mask."""
    return tl.load(at) if WHOLE else tl.load(at, mask=inside, other=0.0)


@triton.jit
def block_scaled_rows(
    a_row, a_scale_row, b_row, b_scale_row, K, BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr
):
    """FP8 rows of A and B."""
    rk = tl.arange(0, 128)
    a_at = a_row[:, None] + rk[None, :]
    b_at = b_row[None, :] + rk[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, 128)):
        inside = k * 128 + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b = load_part(b_at, inside[:, None], EVEN_K)
        scale = load_scale(a_scale_row + k)[:, None] * load_scale(b_scale_row + k)
        acc += tl.dot(a, b, max_num_imprecise_acc=128) * scale
        a_at += 128
        b_at += 128
    return acc


@triton.jit
def bf16_rows(a_row, b_row, b_step, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows of A and B in 16 bits or more; `b_step` is B's distance along K."""
    rk = tl.arange(0, BK)
    a_at = a_row[:, None] + rk[None, :]
    b_at = b_row[None, :] + rk[:, None] * b_step
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, BK)):
        inside = k * BK + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b = load_part(b_at, inside[:, None], EVEN_K)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += BK
        b_at += BK * b_step
    return acc


@triton.jit
def widened_rows(
    a_row, b_row, b_step, b_scale_row, scale_step, K, BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr
):
    """Rows of A in 16 bits or more, FP8 rows of B under 128x128 scales, widened to A's type in registers.

    `b_step` is B's distance along K, `scale_step` that of its scales from one 128 of K to the next.
    """
    rk = tl.arange(0, 128)
    a_at = a_row[:, None] + rk[None, :]
    b_at = b_row[None, :] + rk[:, None] * b_step
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, 128)):
        inside = k * 128 + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b = load_part(b_at, inside[:, None], EVEN_K)
        acc += tl.dot(a, widen(b, a.dtype), input_precision="ieee") * load_scale(b_scale_row + k * scale_step)
        a_at += 128
        b_at += 128 * b_step
    return acc


@triton.jit
def scale_of_two(row, following, first, k):
    """Scales at `row`, or where the tile reaches into the next block of rows, of the columns `first` and of the others.

    Two numbers for a tile: a pointer for each of its columns would take more registers than there are.
    """
    scale = load_scale(row + k)
    if first is not None:
        scale = tl.where(first, scale, load_scale(following + k))
    return scale


@triton.jit
def block_scaled_pair(
    a_row, a_scale_row, gate_row, gate_scale_row, up_row, up_scale_row, up_scale_next, up_first, K,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Two products of FP8 rows; `up_first`: see `scale_of_two`."""
    rk = tl.arange(0, 128)
    a_at = a_row[:, None] + rk[None, :]
    gate_at = gate_row[None, :] + rk[:, None]
    up_at = up_row[None, :] + rk[:, None]
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, 128)):
        inside = k * 128 + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b_gate = load_part(gate_at, inside[:, None], EVEN_K)
        b_up = load_part(up_at, inside[:, None], EVEN_K)
        a_scale = load_scale(a_scale_row + k)[:, None]
        gate += tl.dot(a, b_gate, max_num_imprecise_acc=128) * (a_scale * load_scale(gate_scale_row + k))
        up_scale = scale_of_two(up_scale_row, up_scale_next, up_first, k)
        up += tl.dot(a, b_up, max_num_imprecise_acc=128) * (a_scale * up_scale)
        a_at += 128
        gate_at += 128
        up_at += 128
    return gate, up


@triton.jit
def bf16_pair(a_row, gate_row, up_row, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """Two products of rows in 16 bits or more."""
    rk = tl.arange(0, BK)
    a_at = a_row[:, None] + rk[None, :]
    gate_at = gate_row[None, :] + rk[:, None]
    up_at = up_row[None, :] + rk[:, None]
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, BK)):
        inside = k * BK + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b_gate = load_part(gate_at, inside[:, None], EVEN_K)
        b_up = load_part(up_at, inside[:, None], EVEN_K)
        gate = tl.dot(a, b_gate, gate, input_precision="ieee")
        up = tl.dot(a, b_up, up, input_precision="ieee")
        a_at += BK
        gate_at += BK
        up_at += BK
    return gate, up


@triton.jit
def widened_pair(
    a_row, gate_row, gate_scale_row, up_row, up_scale_row, up_scale_next, up_first, K,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Two products of rows of A in 16 bits or more with FP8 rows of B; `up_first`: see `scale_of_two`."""
    rk = tl.arange(0, 128)
    a_at = a_row[:, None] + rk[None, :]
    gate_at = gate_row[None, :] + rk[:, None]
    up_at = up_row[None, :] + rk[:, None]
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(tl.cdiv(K, 128)):
        inside = k * 128 + rk < K
        a = load_part(a_at, inside[None, :], EVEN_K)
        b_gate = load_part(gate_at, inside[:, None], EVEN_K)
        b_up = load_part(up_at, inside[:, None], EVEN_K)
        gate += tl.dot(a, widen(b_gate, a.dtype), input_precision="ieee") * load_scale(gate_scale_row + k)
        up_scale = scale_of_two(up_scale_row, up_scale_next, up_first, k)
        up += tl.dot(a, widen(b_up, a.dtype), input_precision="ieee") * up_scale
        a_at += 128
        gate_at += 128
        up_at += 128
    return gate, up
