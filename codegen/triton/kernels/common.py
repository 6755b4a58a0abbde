# mypy: ignore-errors
"""Pieces that several kernels share: FP8 scales and casts, tile order.

Quantisation follows the 1x128 recipe of the DeepSeek-V3 technical report (arXiv 2412.19437, sec. 3.3): one scale for
128 neighbours of a row, `amax / 448`; a power-of-two scale is rounded up *before* the values are divided by it.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)
FP8_MAX = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def group_scale(amax, POW2: tl.constexpr):
    """The scale of a group with the largest magnitude `amax`; with POW2 the next power of two at or above it.

    A normal number always: 1 for a group of zeros, the smallest normal where `amax / 448` is less.
    """
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32)), SMALLEST_NORMAL)
    scale = tl.where(amax > 0.0, scale, 1.0)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def quantise_groups(y, scale_ptr, scale_at, mask, POW2: tl.constexpr, FP8: tl.constexpr):
    """Quantises `y[G, 128]`, one scale a row, and stores the scales: float32, or the biased exponent into bytes."""
    scale = group_scale(tl.max(tl.abs(y), 1), POW2)
    if scale_ptr.dtype.element_ty == tl.uint8:
        tl.store(scale_ptr + scale_at, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=mask)
    else:
        tl.store(scale_ptr + scale_at, scale, mask=mask)
    divisor = tl.broadcast_to(scale[:, None], y.shape)
    return tl.div_rn(y, divisor).to(FP8)


@triton.jit
def load_scale(at):
    """Scales behind pointers, in float32: stored as such, or as the biased exponent of a power of two (UE8M0)."""
    scale = tl.load(at)
    if scale.dtype == tl.uint8:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def widen(raw, TO: tl.constexpr):
    """E4M3 values, typed or as bytes, in TO. Bytes are for devices whose hardware does not know the format.

    E4M3's bits, moved to where BF16 keeps exponent and mantissa, are the value times 2^-120, subnormals included.
    """
    if raw.dtype == tl.uint8:
        bits = raw.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        return (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120).to(TO)
    return raw.to(TO)


@triton.jit
def grouped_order(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of program `pid`: GROUP_M rows of tiles are walked together so that B's tiles are met in L2."""
    width = GROUP_M * blocks_n
    first = (pid // width) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def silu_mul(gate, up):
    """SwiGLU's product `gate * sigmoid(gate) * up` in float32."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def limited_silu_mul(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr):
    """`gate * sigmoid(ALPHA * gate) * (up + SHIFT)`, both halves cut at LIMIT (0: not): gpt-oss, arXiv 2508.10925."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return gate * tl.sigmoid(gate * ALPHA) * (up + SHIFT)
