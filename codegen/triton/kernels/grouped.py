# mypy: ignore-errors
"""Grouped matrix products: one weight matrix for each expert, rows of A sorted by expert.

Two layouts of A. *Contiguous*: the experts' rows follow one another, each expert's padded to a multiple of ALIGN, and
`layout[block]` names the expert of a block of ALIGN rows (-1: nothing to do); ALIGN is a multiple of BM. *Masked*, with
ALIGN 0: expert e owns the rows from `e * capacity` on, and `layout[e]` counts those in use.
"""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import quantise_groups, silu_mul
from moec.codegen.triton.kernels.products import bf16_pair, bf16_rows, block_scaled_pair, block_scaled_rows


@triton.jit
def expert_block(layout_ptr, capacity, BM: tl.constexpr, ALIGN: tl.constexpr):
    """Expert, first row and rows in use (0 or less: none) of this program's block of BM rows."""
    block = tl.program_id(1)
    if ALIGN == 0:
        expert = tl.program_id(2)
        first = expert.to(tl.int64) * capacity + block * BM
        used = tl.load(layout_ptr + expert) - block * BM
    else:
        expert = tl.load(layout_ptr + block * BM // ALIGN)
        first = block.to(tl.int64) * BM
        used = tl.where(expert >= 0, BM, 0)
    return expert.to(tl.int64), first, used


@triton.jit
def grouped_fp8_gemm(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, layout_ptr, N, K, capacity,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """a[R, K], a_scale[R, K/128], b[E, N, K], b_scale[E, ceil(N/128), K/128] -> c[R, N]: down projection."""
    expert, first, used = expert_block(layout_ptr, capacity, BM, ALIGN)
    if used > 0:
        pn = tl.program_id(0)
        rm = tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN)
        am = first + tl.where(rm < used, rm, 0)
        bn = expert * N + tl.where(rn < N, rn, 0)
        groups = tl.cdiv(K, 128)
        b_scale_row = b_scale_ptr + (expert * tl.cdiv(N, 128) + pn * BN // 128) * groups
        acc = block_scaled_rows(
            a_ptr + am * K, a_scale_ptr + am * groups, b_ptr + bn * K, b_scale_row, K, BM, BN, EVEN_K
        )
        c_at = c_ptr + (first + rm)[:, None] * N + rn[None, :]
        tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(rm[:, None] < used) & (rn[None, :] < N))


@triton.jit
def grouped_fp8_swiglu(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, c_scale_ptr, layout_ptr, INNER, K, capacity,
    BM: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Gate and up projection, SwiGLU and 1x128 quantisation in one pass over A.

    a[R, K], a_scale[R, K/128], b[E, 2*INNER, K] (gate rows, then up rows) with b_scale[E, 2*INNER/128, K/128]
    -> c[R, INNER] FP8, c_scale[R, INNER/128]. INNER is a multiple of 128: a program owns one group of 128 columns.
    """
    expert, first, used = expert_block(layout_ptr, capacity, BM, ALIGN)
    if used > 0:
        group = tl.program_id(0)
        rm = tl.arange(0, BM)
        rk = tl.arange(0, 128)
        am = first + tl.where(rm < used, rm, 0)
        groups = tl.cdiv(K, 128)
        gate_row = b_ptr + (expert * 2 * INNER + group * 128 + tl.arange(0, 128)) * K
        gate_scale_row = b_scale_ptr + (expert * (2 * INNER // 128) + group) * groups
        up_scale_row = gate_scale_row + (INNER // 128) * groups
        gate, up = block_scaled_pair(
            a_ptr + am * K, a_scale_ptr + am * groups, gate_row, gate_scale_row, gate_row + INNER.to(tl.int64) * K,
            up_scale_row, up_scale_row, None, K, BM, 128, EVEN_K,
        )  # fmt: skip
        rows = first + rm
        c = quantise_groups(
            silu_mul(gate, up), c_scale_ptr, rows * (INNER // 128) + group, rm < used, POW2, c_ptr.dtype.element_ty
        )
        tl.store(c_ptr + rows[:, None] * INNER + group * 128 + rk[None, :], c, mask=rm[:, None] < used)


@triton.jit
def grouped_bf16_gemm(
    a_ptr, b_ptr, c_ptr, layout_ptr, N, K, capacity,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """a[R, K], b[E, N, K] -> c[R, N], for devices without FP8 matrix units."""
    expert, first, used = expert_block(layout_ptr, capacity, BM, ALIGN)
    if used > 0:
        rm = tl.arange(0, BM)
        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        am = first + tl.where(rm < used, rm, 0)
        bn = expert * N + tl.where(rn < N, rn, 0)
        acc = bf16_rows(a_ptr + am * K, b_ptr + bn * K, 1, K, BM, BN, BK, EVEN_K)
        c_at = c_ptr + (first + rm)[:, None] * N + rn[None, :]
        tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(rm[:, None] < used) & (rn[None, :] < N))


@triton.jit
def grouped_bf16_swiglu(
    a_ptr, b_ptr, c_ptr, layout_ptr, INNER, K, capacity,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """a[R, K], b[E, 2*INNER, K] (gate rows, then up rows) -> c[R, INNER]: gate and up projection with SwiGLU."""
    expert, first, used = expert_block(layout_ptr, capacity, BM, ALIGN)
    if used > 0:
        rm = tl.arange(0, BM)
        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        am = first + tl.where(rm < used, rm, 0)
        gate_row = b_ptr + (expert * 2 * INNER + tl.where(rn < INNER, rn, 0)) * K
        gate, up = bf16_pair(a_ptr + am * K, gate_row, gate_row + INNER.to(tl.int64) * K, K, BM, BN, BK, EVEN_K)
        c_at = c_ptr + (first + rm)[:, None] * INNER + rn[None, :]
        c = silu_mul(gate, up).to(c_ptr.dtype.element_ty)
        tl.store(c_at, c, mask=(rm[:, None] < used) & (rn[None, :] < INNER))
