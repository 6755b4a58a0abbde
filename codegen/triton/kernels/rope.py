# mypy: ignore-errors
"""Rotary position embedding, and the write of one token's latent and rotated key into the paged cache."""

import triton
import triton.language as tl

from moec.codegen.triton.kernels.common import pair_offsets, quantise_groups


@triton.jit
def rope(
    x_ptr, y_ptr, cos_ptr, sin_ptr, position_ptr, x_token, x_head, y_token, y_head, H,
    DR: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotates DR elements of every head of every token; distances in elements, `y` may be `x`.

    cos, sin [positions, DR/2] float32. Pairs are neighbours (INTERLEAVED) or the two halves, in `x` and `y` alike.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    HALF: tl.constexpr = DR // 2
    pair = tl.arange(0, HALF)
    first, second = pair_offsets(pair, HALF, INTERLEAVED)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + pair)[None, :]
    sin = tl.load(sin_ptr + position * HALF + pair)[None, :]
    inside = (head < H)[:, None]
    x_at = x_ptr + token * x_token + head[:, None] * x_head
    y_at = y_ptr + token * y_token + head[:, None] * y_head
    a = tl.load(x_at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at + first[None, :], (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_at + second[None, :], (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def latent_append(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, latent_ptr, rope_ptr, scale_ptr, x_token, eps,
    DV: tl.constexpr, DR: tl.constexpr, LATENT_ROW: tl.constexpr, ROPE_ROW: tl.constexpr, SCALE_ROW: tl.constexpr,
    INTERLEAVED: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Norm of the latent, rotation of the shared key, quantisation (SCALE_ROW > 0) and the write into the cache.

    x[T, DV+DR] at distance `x_token`; weight[DV]; slot[T] is the cache row of each token, negative for a token that
    is only padding. latent, rope and scale open the same cache rows at their own distances, in elements.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        G: tl.constexpr = DV // 128
        HALF: tl.constexpr = DR // 2
        rg = tl.arange(0, G)
        column = rg[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_ptr + token * x_token + column).to(tl.float32)
        mean_square = tl.sum(tl.sum(x * x, 1), 0) / DV
        y = x * (1.0 / tl.sqrt_rn(mean_square + eps)) * tl.load(weight_ptr + column).to(tl.float32)
        if SCALE_ROW > 0:
            y = quantise_groups(y, scale_ptr, slot * SCALE_ROW + rg, rg < G, POW2, latent_ptr.dtype.element_ty)
        tl.store(latent_ptr + slot * LATENT_ROW + column, y.to(latent_ptr.dtype.element_ty))
        pair = tl.arange(0, HALF)
        first, second = pair_offsets(pair, HALF, INTERLEAVED)
        position = tl.load(position_ptr + token).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + pair)
        sin = tl.load(sin_ptr + position * HALF + pair)
        a = tl.load(x_ptr + token * x_token + DV + first).to(tl.float32)
        b = tl.load(x_ptr + token * x_token + DV + second).to(tl.float32)
        at = rope_ptr + slot * ROPE_ROW
        tl.store(at + first, (a * cos - b * sin).to(rope_ptr.dtype.element_ty))
        tl.store(at + second, (b * cos + a * sin).to(rope_ptr.dtype.element_ty))
