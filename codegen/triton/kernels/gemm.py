# mypy: ignore-errors
"""Matrix products `C[M, N] = A[M, K] B[N, K]^T`: FP8 with block scales, and BF16."""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import grouped_order, load_scale
from moec.codegen.triton.kernels.products import bf16_rows, block_scaled_rows


@triton.jit
def fp8_gemm(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Pointer form. a[M, K], a_scale[M, ceil(K/128)], b[N, K], b_scale[ceil(N/128), ceil(K/128)] -> c[M, N]."""
    pm, pn = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    # Rows past the end read row 0 instead of a mask: the loads stay whole and the store drops them.
    am = tl.where(rm < M, rm, 0).to(tl.int64)
    bn = tl.where(rn < N, rn, 0).to(tl.int64)
    groups = tl.cdiv(K, 128)
    b_scale_row = b_scale_ptr + (pn * BN // 128) * groups
    acc = block_scaled_rows(a_ptr + am * K, a_scale_ptr + am * groups, b_ptr + bn * K, b_scale_row, K, BM, BN, EVEN_K)
    c_at = c_ptr + rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def fp8_gemm_tma(
    a_desc, a_scale_ptr, b_desc, b_scale_ptr, c_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    """The same product with A and B read through tensor-memory descriptors of [BM, 128] and [BN, 128] boxes.

    SPECIALISE gives the loads to warps of their own.
    """
    pm, pn = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    groups = tl.cdiv(K, 128)
    a_scale_row = a_scale_ptr + tl.where(rm < M, rm, 0).to(tl.int64) * groups
    b_scale_row = b_scale_ptr + (pn * BN // 128) * groups
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, groups, warp_specialize=SPECIALISE):
        a = a_desc.load([pm * BM, k * 128])
        b = b_desc.load([pn * BN, k * 128])
        scale = load_scale(a_scale_row + k) * load_scale(b_scale_row + k)
        acc += tl.dot(a, b.T, max_num_imprecise_acc=128) * scale[:, None]
    c_at = c_ptr + rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def bf16_gemm(
    a_ptr, b_ptr, c_ptr, M, N, K, lda, ldb, ldc, a_batch, b_batch, c_batch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, B_IS_NK: tl.constexpr,
):  # fmt: skip
    """A batch of products, one for each program of axis 1, with leading dimensions and batch strides in elements.

    B is stored [N, K] (a linear layer's weight) or, without B_IS_NK, [K, N] (the absorbed key projection).
    """
    pm, pn = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    batch = tl.program_id(1).to(tl.int64)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    am = tl.where(rm < M, rm, 0).to(tl.int64)
    bn = tl.where(rn < N, rn, 0).to(tl.int64)
    a_row = a_ptr + batch * a_batch + am * lda
    if B_IS_NK:
        acc = bf16_rows(a_row, b_ptr + batch * b_batch + bn * ldb, 1, K, BM, BN, BK, EVEN_K)
    else:
        acc = bf16_rows(a_row, b_ptr + batch * b_batch + bn, ldb, K, BM, BN, BK, EVEN_K)
    c_at = c_ptr + batch * c_batch + rm[:, None].to(tl.int64) * ldc + rn[None, :]
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))
