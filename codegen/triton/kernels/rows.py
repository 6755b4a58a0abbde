# mypy: ignore-errors
"""Row-wise kernels: norms, quantisation, SwiGLU, embedding."""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import quantise_groups, silu_mul


@triton.jit
def rms_norm(
    x_ptr, residual_ptr, weight_ptr, y_ptr, q_ptr, scale_ptr, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr, QUANTISE: tl.constexpr,
    POW2: tl.constexpr,
):  # fmt: skip
    """x[T, D] -> y = norm(x) * weight (KEEP) and its 1x128 quantisation q, scale (QUANTISE), one row a program.

    With RESIDUAL the sum `residual + x` is normed, and written back to `residual`. GROUPS is a power of two of at
    least D/128. Pointers of what is not asked for are None.
    """
    row = tl.program_id(0).to(tl.int64)
    rg = tl.arange(0, GROUPS)
    column = rg[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < D
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * D + column, total, mask=inside)
        # The norm sees what the next layer will read: the sum as stored.
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, 1), 0) / D
    y = x * (1.0 / tl.sqrt_rn(mean_square + eps)) * weight
    if KEEP:
        tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    if QUANTISE:
        G: tl.constexpr = (D + 127) // 128
        q = quantise_groups(y, scale_ptr, row * G + rg, rg < G, POW2, q_ptr.dtype.element_ty)
        tl.store(q_ptr + row * D + column, q, mask=inside)


@triton.jit
def quantise(x_ptr, q_ptr, scale_ptr, K, GROUPS: tl.constexpr, POW2: tl.constexpr):
    """x[M, K] -> q[M, K] FP8, scale[M, ceil(K/128)] (float32, or UE8M0 bytes); GROUPS groups a program."""
    row = tl.program_id(0).to(tl.int64)
    rg = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = rg[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < K
    groups = tl.cdiv(K, 128)
    x = tl.load(x_ptr + row * K + column, mask=inside, other=0.0).to(tl.float32)
    q = quantise_groups(x, scale_ptr, row * groups + rg, rg < groups, POW2, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * K + column, q, mask=inside)


@triton.jit
def swiglu(x_ptr, y_ptr, scale_ptr, INNER, GROUPS: tl.constexpr, QUANTISE: tl.constexpr, POW2: tl.constexpr):
    """x[M, 2*INNER] (gate, then up) -> y[M, INNER] in FP8 with scale[M, ceil(INNER/128)], or in high precision."""
    row = tl.program_id(0).to(tl.int64)
    rg = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = rg[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < INNER
    gate = tl.load(x_ptr + row * 2 * INNER + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * INNER + INNER + column, mask=inside, other=0.0).to(tl.float32)
    y = silu_mul(gate, up)
    if QUANTISE:
        groups = tl.cdiv(INNER, 128)
        y = quantise_groups(y, scale_ptr, row * groups + rg, rg < groups, POW2, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * INNER + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding(ids_ptr, table_ptr, y_ptr, D, BLOCK: tl.constexpr):
    """ids[T], table[V, D] -> y[T, D]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + token * D + column, mask=column < D, other=0.0)
    tl.store(y_ptr + row * D + column, x, mask=column < D)


@triton.jit
def add(a_ptr, b_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """y = a + b, summed in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (a + b).to(y_ptr.dtype.element_ty), mask=at < N)
