"""Few rows times MXFP4 weights by integer dot products (AVX-512 VNNI): half the instructions of widening to FP32.

Twice an E2M1 number is an integer of at most 12, so a weight is an 8-bit integer after one table lookup. A row of x
becomes integers of 20 bits, by a power of two for each 32 numbers, in three signed digits of 7 bits; sums of a block
are exact, and what is lost is at most 2^-20 of the largest number of a block. The instruction multiplies unsigned by
signed bytes: weights carry an offset of 12, whose products are taken off at the start.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.decode import block_scale
from moec.codegen.tvm.gemv import ahead, in_groups, prefetch, streams, weight_params
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, const, intrinsic, kernel_body, splat, variables
from moec.codegen.tvm.vector import max_lanes, sum_lanes
from moec.ir.lane16 import MXFP4, ROWS, Format

BLOCK = MXFP4.scale_block
_PLANES = 3
_DIGIT = 7  # bits of a digit
_OFFSET = 12
_LINES = BLOCK // MXFP4.per_lane
_RECORD = 32
"""4-byte words of 32 numbers: eight words of digits in each plane, from the highest on, then the planes' first sums,
the factor of the block, four unused. A word of digits has the even or the odd ones of eight numbers, as the nibbles of
a lane do."""
_SUMS, _FACTOR = _PLANES * 8, _PLANES * 8 + _PLANES
_TABLE = [_OFFSET + m for m in (0, 1, 2, 3, 4, 6, 8, 12)] + [_OFFSET - m for m in (0, 1, 2, 3, 4, 6, 8, 12)]


def multiplies(fmt: Format, machine: Machine) -> bool:
    """Whether these kernels exist for a format on a machine."""
    return fmt == MXFP4 and machine.lanes == 16 and "avx512vnni" in machine.features


@cache
def digit_row(machine: Machine) -> Kernel:
    """One row of x as digits. Parameters: source f32[n], target (see `_RECORD`), n, padded (i32; zero beyond n)."""
    kernel = Kernel("digit_row", tvm.ir.GlobalVar("digit_row"))
    params: list[Param] = [("source", "float32", (1 << 40,)), ("target", "float32", (1 << 40,))]
    with kernel_body(kernel, [*params, ("n", "int32"), ("padded", "int32")]) as (source, target, n, padded):
        whole = T.Bind(n // BLOCK)
        with T.serial(0, whole) as b:
            _digits(source, b * BLOCK, target, b * _RECORD)
        with T.serial(0, padded // BLOCK - whole) as j:
            rest = T.alloc_buffer((BLOCK,), "float32", scope="global")
            with T.serial(0, BLOCK) as i:
                T.buffer_store(rest, const(0.0, "float32"), [i])
            with T.serial(0, T.max(T.min(n - (whole + j) * BLOCK, BLOCK), 0)) as i:
                T.buffer_store(rest, source[(whole + j) * BLOCK + i], [i])
            _digits(rest, const(0), target, (whole + j) * _RECORD)
    return kernel


def _digits(source: Any, first: Any, target: Any, record: Any) -> None:
    halves = [T.Bind(source.vload([first + h * ROWS], "float32x16")) for h in range(2)]
    magnitudes = [T.max(v, splat(0.0, ROWS) - v) for v in halves]
    top = T.Bind(max_lanes(T.Bind(T.max(*magnitudes)), ROWS))
    # The power of two below the largest number; numbers below 2^-90 of it do not matter.
    exponent = T.Bind(T.max(T.bitwise_and(T.reinterpret("int32", top), const(0x7F800000)), const(30 << 23)))
    up = T.reinterpret("float32", const(254 << 23) - exponent) * const(2.0**19, "float32")
    # Not a number, where a number is infinite or none.
    zero = splat(0.0, ROWS)
    odd = T.Bind(sum_lanes(T.Bind(T.fma(halves[0], zero, T.fma(halves[1], zero, zero))), ROWS))
    factor = T.reinterpret("float32", exponent) * const(2.0**-20, "float32") + odd
    left = [T.Bind(T.nearbyint(v * T.broadcast(T.Bind(up), ROWS))) for v in halves]
    order = [k for group in (0, 8) for first_k in (0, 1) for k in range(group + first_k, group + 8, 2)]
    for plane in range(_PLANES):
        unit = 2.0 ** (_DIGIT * (_PLANES - 1 - plane))
        digits = [T.Bind(T.nearbyint(v * splat(1 / unit, ROWS))) if unit > 1 else v for v in left]
        left = [T.Bind(v - d * splat(unit, ROWS)) for v, d in zip(left, digits, strict=True)]
        for h, d in enumerate(digits):
            small = T.Bind(T.Cast("int8x16", T.Cast("int32x16", d)))
            words = T.reinterpret("float32x4", T.Shuffle([small], [const(k) for k in order]))
            T.buffer_store(target, words, [T.ramp(record + plane * 8 + h * 4, 1, 4)])
        total = T.Bind(sum_lanes(T.Bind(digits[0] + digits[1]), ROWS))
        start = T.Cast("int32", total * const(-float(_OFFSET), "float32"))
        T.buffer_store(target, T.reinterpret("float32", start), [record + _SUMS + plane])
    T.buffer_store(target, factor, [record + _FACTOR])


@cache
def row_tiles(m: int, machine: Machine) -> Kernel:
    """out[tiles, m, 16] = the products of m rows of digits, `ldx` words apart, with that many packed tiles.

    Parameters: as of `gemv.row_tiles`.
    """
    name = f"vnni_tiles_m{m}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [(n, "float32", (1 << 40,)) for n in ("x", "out")]
    params += [(n, "int32") for n in ("ldx", "k", "tiles")]
    with kernel_body(kernel, [*weight_params(MXFP4), *params]) as (w, scale, x, out, ldx, k, tiles):
        table = T.Bind(T.Shuffle([const(v, "int8") for v in _TABLE * 4], [const(i) for i in range(64)]))
        words = T.Bind(T.Cast("int64", k // MXFP4.per_lane * ROWS))
        per_tile = T.Bind(T.Cast("int64", k // BLOCK * ROWS))

        def group(first: Any, count: int) -> None:
            totals = [variables(m, "float32x16") for _ in range(count)]
            for total in (t for tile in totals for t in tile):
                assign(total, splat(0.0, ROWS))
            lines = [T.Bind((T.Cast("int64", first) + t) * words) for t in range(count)]
            scales = [T.Bind((T.Cast("int64", first) + t) * per_tile) for t in range(count)]
            with T.serial(0, k // BLOCK) as block:
                position = T.Bind(T.Cast("int64", block * (_LINES * ROWS)))
                distance = ahead(position, words, count)
                records = [T.Bind(r * ldx + block * _RECORD) for r in range(m)]
                for t in range(count):
                    at = T.Bind(scales[t] + T.Cast("int64", block * ROWS))
                    # The scales are another stream: those of the next tiles.
                    prefetch(scale, at + per_tile * count)
                    values = _block(w, x, T.Bind(lines[t] + position), distance, records, table)
                    factors = T.Bind(block_scale(MXFP4, scale, at, 0, 0, ROWS))
                    for r, value in enumerate(values):
                        factor = factors * T.broadcast(x[records[r] + _FACTOR], ROWS)
                        assign(totals[t][r], totals[t][r][0] + T.Cast("float32x16", value) * factor)
            for t in range(count):
                for r in range(m):
                    at = T.Cast("int64", first + t) * (m * ROWS) + r * ROWS
                    T.buffer_store(out, totals[t][r][0], [T.ramp(at, 1, ROWS)])

        in_groups(tiles, streams(2 * m, machine), group)
    return kernel


def _block(w: Any, x: Any, start: Any, distance: Any, records: list[Any], table: Any) -> list[Any]:
    """The exact sums of one block of the tile whose words begin at `start`, for each row of digits."""
    nibble = splat(0x0F0F0F0F, ROWS, "int32")
    sums = [[variables(1, "int32x16")[0] for _ in range(_PLANES)] for _ in records]
    for record, planes in zip(records, sums, strict=True):
        for p, s in enumerate(planes):
            assign(s, _spread(x, record + _SUMS + p))
    for u in range(_LINES):
        line = T.Bind(start + u * ROWS)
        prefetch(w, line + distance)
        v = T.Bind(w.vload([line], "int32x16"))
        for half, bits in enumerate((v, T.shift_right(v, splat(4, ROWS, "int32")))):
            index = T.reinterpret("int8x64", T.bitwise_and(bits, nibble))
            number = T.Bind(intrinsic("llvm.x86.avx512.pshuf.b.512", table, index, returns="int8x64"))
            for record, planes in zip(records, sums, strict=True):
                for p, s in enumerate(planes):
                    assign(s, _dot(s[0], number, _spread(x, record + (p * 8 + u * 2 + half))))
    digit = splat(_DIGIT, ROWS, "int32")
    out = []
    for planes in sums:
        value = planes[0][0]
        for s in planes[1:]:
            value = T.Bind(T.shift_left(value, digit) + s[0])
        out.append(value)
    return out


def _spread(x: Any, at: Any) -> Any:
    return T.broadcast(T.reinterpret("int32", x[at]), ROWS)


def _dot(sums: Any, weights: Any, digits: Any) -> Any:
    """sums + the products of four unsigned and four signed bytes in every lane."""
    digits = T.reinterpret("int8x64", digits)
    return intrinsic("llvm.x86.avx512.vpdpbusd.512", sums, weights, digits, returns="int32x16")
