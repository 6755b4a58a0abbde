"""Rows of an FP8 latent cache: `[E4M3 latent | one FP32 scale per 128 of it | BF16 rotary key]`, in bytes.

656 bytes for a latent of 512 and a key of 64, the layout of FlashMLA's FP8 cache (github.com/deepseek-ai/FlashMLA). A
scale is `amax / 448` of its 128 values, 1 for zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.quantise import LARGEST, amax_of, magnitude, round_e4m3, scale_of
from moec.codegen.tvm.tir import const
from moec.codegen.tvm.vector import bf16_to_f32, f32, f32_to_bf16, fill, foreach, load, spread, store

BLOCK = 128


def row_bytes(latent: int, rope: int) -> int:
    """Bytes of one cached position."""
    return latent + 4 * -(-latent // BLOCK) + 2 * rope


def widen_row(
    cache: Any, source: Any, latent: int, rope: int, lanes: int, put: Callable[[Any, Any, int], None]
) -> None:
    """`put(i, value, width)` for every element of the row at byte `source`, in FP32, latent first."""
    blocks = -(-latent // BLOCK)
    for b in range(blocks):
        begin = b * BLOCK
        scale = T.Bind(load_scale(cache, source + latent + 4 * b) * const(2.0**120, "float32"))

        def widen(i: Any, width: int, begin: int = begin, scale: Any = scale) -> None:
            value = decode_e4m3(load(cache, source + begin + i, width), width)
            put(begin + i, T.Bind(value * spread(scale, width)), width)

        foreach(min(BLOCK, latent - begin), lanes, widen)
    tail = source + latent + 4 * blocks

    def key(i: Any, width: int) -> None:
        put(latent + i, bf16_to_f32(_load_u16(cache, tail + 2 * i, width), width), width)

    foreach(rope, lanes, key)


def narrow_row(
    cache: Any,
    target: Any,
    latent: Any,
    latent_at: Any,
    rope_key: Any,
    rope_at: Any,
    sizes: tuple[int, int],
    lanes: int,
) -> None:
    """Store a latent and a rotary key (FP32, from `latent_at` and `rope_at` on) as the row at byte `target`."""
    rank, rope = sizes
    blocks = -(-rank // BLOCK)
    for b in range(blocks):
        begin = b * BLOCK
        extent = min(BLOCK, rank - begin)
        scale = scale_of(amax_of(latent, latent_at + begin, extent, lanes), pow2=False)
        _store_bytes(cache, T.reinterpret("uint32", scale), target + rank + 4 * b, 4)

        def convert(i: Any, width: int, begin: int = begin, scale: Any = scale) -> None:
            scaled = T.Bind(load(latent, latent_at + begin + i, width) / spread(scale, width))
            bounded = T.max(T.min(scaled, fill(LARGEST, width)), fill(-LARGEST, width))
            store(cache, encode_e4m3(round_e4m3(bounded, width), width), target + begin + i, width)

        foreach(extent, lanes, convert)
    tail = target + rank + 4 * blocks

    def key(i: Any, width: int) -> None:
        bits = f32_to_bf16(load(rope_key, rope_at + i, width), width)
        if width == 1:
            _store_bytes(cache, T.Cast("uint32", bits), tail + 2 * i, 2)
        else:
            store(cache, T.reinterpret(f"uint8x{2 * width}", bits), tail + 2 * i, 2 * width)

    foreach(rope, lanes, key)


def decode_e4m3(bits: Any, width: int) -> Any:
    """E4M3 bytes as FP32 of value * 2^-120, subnormals included."""
    wide = T.Bind(T.Cast(_u32(width), bits))
    sign = T.shift_left(T.bitwise_and(wide, fill(0x80, width, "uint32")), fill(24, width, "uint32"))
    rest = T.shift_left(T.bitwise_and(wide, fill(0x7F, width, "uint32")), fill(20, width, "uint32"))
    return T.Bind(T.reinterpret(f32(width), T.bitwise_or(sign, rest)))


def encode_e4m3(value: Any, width: int) -> Any:
    """The bytes of FP32 lanes that are E4M3 values."""
    value = T.Bind(value)
    bits = T.Bind(T.reinterpret(_u32(width), value))
    sign = T.bitwise_and(T.shift_right(bits, fill(24, width, "uint32")), fill(0x80, width, "uint32"))
    size = T.Bind(magnitude(value, width))
    small = T.Cast(_u32(width), size * fill(512.0, width))
    exponent_bias = fill((127 - 7) << 3, width, "uint32")
    normal = T.shift_right(T.reinterpret(_u32(width), size), fill(20, width, "uint32")) - exponent_bias
    code = T.Select(size < fill(2.0**-6, width), small, normal)
    return T.Bind(T.Cast("uint8" if width == 1 else f"uint8x{width}", T.bitwise_or(sign, code)))


def _u32(width: int) -> str:
    return "uint32" if width == 1 else f"uint32x{width}"


def load_scale(cache: Any, at: Any) -> Any:
    """The FP32 number at byte `at`, wherever that lies."""
    bits = T.Cast("uint32", cache[at])
    for n in range(1, 4):
        bits = T.bitwise_or(bits, T.shift_left(T.Cast("uint32", cache[at + n]), const(8 * n, "uint32")))
    return T.Bind(T.reinterpret("float32", T.Bind(bits)))


def _load_u16(cache: Any, at: Any, width: int) -> Any:
    if width == 1:
        high = T.shift_left(T.Cast("uint16", cache[at + 1]), const(8, "uint16"))
        return T.Bind(T.bitwise_or(T.Cast("uint16", cache[at]), high))
    return T.Bind(T.reinterpret(f"uint16x{width}", load(cache, at, 2 * width)))


def _store_bytes(cache: Any, bits: Any, at: Any, count: int) -> None:
    bits = T.Bind(bits)
    for n in range(count):
        byte = T.bitwise_and(T.shift_right(bits, const(8 * n, "uint32")), const(0xFF, "uint32"))
        T.buffer_store(cache, T.Cast("uint8", byte), [at + n])
