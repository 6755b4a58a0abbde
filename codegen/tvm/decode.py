"""Packed lanes to fp32 vectors: how each storage format is widened in registers.

The E4M3 bits are moved into the fp32 exponent and mantissa by shifts and one mask, which gives value * 2^-120
exactly, subnormals included (fp32 denormals must not be flushed). Products with such numbers would underflow, so the
other operand or the block scale is multiplied by `Decoder.pre` = 2^60 and the finished sum by `Decoder.post` = 2^60.
TVM 0.27's own float8_e4m3fn -> float32 cast is wrong on LLVM for zero and subnormals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.formats import Format
from moec.codegen.tvm.tir import splat


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


_DECODERS = {
    "f32": Decoder(_f32),
    "bf16": Decoder(_bf16),
    "fp8_e4m3": Decoder(_fp8_e4m3, pre=2.0**60, post=2.0**60),
}


def decoder(fmt: Format) -> Decoder:
    """The decoder of a storage format."""
    return _DECODERS[fmt.name]
