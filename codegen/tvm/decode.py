"""Packed lanes to fp32 vectors: how each storage format is widened in registers.

The E4M3 bits are moved into the fp32 exponent and mantissa by shifts and one mask, which gives value * 2^-120
exactly, subnormals included (fp32 denormals must not be flushed). Products with such numbers would underflow, so the
other operand or the block scale is multiplied by `Decoder.pre` = 2^60 and the finished sum by `Decoder.post` = 2^60.
An fp32 denormal costs Intel processors over a hundred cycles: where FP16 arithmetic exists, which is free of that,
E4M3 is normalised in FP16 first and becomes value * 2^-112.
TVM 0.27's own float8_e4m3fn -> float32 cast is wrong on LLVM for zero and subnormals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Machine, const, intrinsic, splat
from moec.ir.lane16 import ROWS, Format


@dataclass(frozen=True)
class Decoder:
    """`unpack(v, lanes)`: int32 lanes -> one float32 vector per k of a lane; true value = vector * pre * post."""

    unpack: Callable[[Any, int], list[Any]]
    pre: float = 1.0
    post: float = 1.0


def _as_f32(bits: Any, lanes: int) -> Any:
    return T.reinterpret(f"float32x{lanes}", bits)


def _f32(v: Any, lanes: int) -> list[Any]:
    return [_as_f32(v, lanes)]


def _bf16(v: Any, lanes: int) -> list[Any]:
    high = T.bitwise_and(v, splat(-65536, lanes, "int32"))
    return [_as_f32(T.shift_left(v, splat(16, lanes, "int32")), lanes), _as_f32(high, lanes)]


def _fp8_e4m3(v: Any, lanes: int) -> list[Any]:
    def half(bits: int) -> Any:
        return splat(bits, 2 * lanes, "int16")

    def widen(pairs: Any) -> Any:
        # Arithmetic shift: the sign is copied down and the mask keeps one copy of it.
        return T.Bind(T.reinterpret(f"int32x{lanes}", T.shift_right(pairs, half(4))))

    mask = splat(0x87F00000 - (1 << 32), lanes, "int32")
    pairs = T.reinterpret(f"int16x{2 * lanes}", v)
    odd = widen(pairs)
    even = widen(T.shift_left(pairs, half(8)))
    up = splat(16, lanes, "int32")
    bits = [T.shift_left(even, up), T.shift_left(odd, up), even, odd]
    return [_as_f32(T.bitwise_and(b, mask), lanes) for b in bits]


E4M3_SHIFT = 112
"""Binary places by which `e4m3_as_bf16` makes its numbers smaller."""


def e4m3_as_bf16(v: Any) -> list[Any]:
    """16 lanes of four E4M3 numbers as two int16x32 vectors of BF16 pairs, values * 2^-E4M3_SHIFT; no pair is denormal.

    The first holds the first and third number of every lane, the second the others.
    """
    # E4M3 fits FP16 with its exponent moved by 8, subnormals included; multiplying by 2^8 makes them normal.
    half = T.Bind(T.reinterpret("int16x32", v))
    out = []
    for bits in (T.shift_left(half, splat(8, 32, "int16")), half):
        placed = T.bitwise_and(T.shift_right(bits, splat(1, 32, "int16")), splat(0xBF80 - 0x10000, 32, "int16"))
        wide = T.reinterpret("float16x32", placed) * splat(256.0, 32, "float16")
        exponent = T.shift_right(T.reinterpret("int16x32", wide), splat(3, 32, "int16"))
        out.append(T.Bind(T.bitwise_and(exponent, splat(0x8FFF - 0x10000, 32, "int16"))))
    return out


def _fp8_avx512fp16(v: Any, lanes: int) -> list[Any]:
    pairs = [_bf16(T.Bind(T.reinterpret("int32x16", p)), lanes) for p in e4m3_as_bf16(v)]
    return [pairs[k % 2][k // 2] for k in range(4)]


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _fp4_e2m1(v: Any, lanes: int) -> list[Any]:
    """By arithmetic: with the exponent moved to FP32's, codes 0 and 1 alone come out wrong, as 0.5 and 0.75."""
    out = []
    for k in range(8):
        bits = T.shift_left(v, splat(28 - 4 * k, lanes, "int32")) if k < 7 else v
        magnitude = T.bitwise_and(T.shift_right(bits, splat(6, lanes, "int32")), splat(0x7 << 22, lanes, "int32"))
        t = T.Bind(_as_f32(magnitude + splat(126 << 23, lanes, "int32"), lanes))
        value = T.min(t, t + t - splat(1.0, lanes))
        sign = T.bitwise_and(bits, splat(-(1 << 31), lanes, "int32"))
        out.append(T.Bind(_as_f32(T.bitwise_or(T.reinterpret(f"int32x{lanes}", value), sign), lanes)))
    return out


def _fp4_avx2(v: Any, lanes: int) -> list[Any]:
    """By a table of the magnitudes in a register."""
    table = T.Bind(T.Shuffle([const(m, "float32") for m in _E2M1], [const(i) for i in range(8)]))
    out = []
    for k in range(8):
        index = T.shift_right(v, splat(4 * k, lanes, "int32")) if k else v
        value = T.reinterpret("int32x8", intrinsic("llvm.x86.avx2.permps", table, index, returns="float32x8"))
        high = T.shift_left(v, splat(28 - 4 * k, lanes, "int32")) if k < 7 else v
        sign = T.bitwise_and(high, splat(-(1 << 31), lanes, "int32"))
        out.append(T.Bind(_as_f32(T.bitwise_or(value, sign), lanes)))
    return out


def _fp4_avx512(v: Any, lanes: int) -> list[Any]:
    """By a table of all values in a register; an index is the low four bits of a lane."""
    values = [*_E2M1, *(-m for m in _E2M1)]
    table = T.Bind(T.Shuffle([const(m, "float32") for m in values], [const(i) for i in range(16)]))
    indices = [T.shift_right(v, splat(4 * k, lanes, "int32")) if k else v for k in range(8)]
    name = "llvm.x86.avx512.permvar.sf.512"
    return [T.Bind(intrinsic(name, table, index, returns="float32x16")) for index in indices]


_DECODERS = {
    "f32": Decoder(_f32),
    "bf16": Decoder(_bf16),
    "fp8_e4m3": Decoder(_fp8_e4m3, pre=2.0**60, post=2.0**60),
    "fp8_e4m3_rows": Decoder(_fp8_e4m3, pre=2.0**60, post=2.0**60),
}


def decoder(fmt: Format, machine: Machine) -> Decoder:
    """The decoder of a storage format on a machine."""
    if fmt.bits == 8 and machine.lanes == 16 and "avx512fp16" in machine.features:
        return Decoder(_fp8_avx512fp16, pre=2.0 ** (E4M3_SHIFT / 2), post=2.0 ** (E4M3_SHIFT / 2))
    if fmt.name == "fp4_e2m1":
        if machine.mcpu == "x86-64-v4" and machine.lanes == 16:
            return Decoder(_fp4_avx512)
        x86 = machine.mcpu in ("x86-64-v3", "x86-64-v4")
        return Decoder(_fp4_avx2 if x86 and machine.lanes == 8 else _fp4_e2m1)
    return _DECODERS[fmt.name]


def block_scale(fmt: Format, scale: Any, start: Any, block: Any, first_row: int, lanes: int) -> Any:
    """The scales of `lanes` rows from `first_row` on of a tile whose scales begin at `start`, for one block of k."""
    if not fmt.row_scales:
        return T.broadcast(scale[start + block], lanes)
    at = start + block * ROWS + first_row
    if fmt.scale_dtype == "float32":
        return scale.vload([at], f"float32x{lanes}")
    exponents = scale.vload([at], f"uint8x{lanes}")
    return _as_f32(T.shift_left(T.Cast(f"int32x{lanes}", exponents), splat(23, lanes, "int32")), lanes)
