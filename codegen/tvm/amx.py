"""Matrix tiles of x86 (AMX): the instructions, activations as pairs of BF16 numbers, and weights as BF16 tiles.

A tile has 16 rows of 64 bytes. `dot` adds to a tile of FP32 sums [rows, 16] the product of BF16 pairs: x [rows, 32 k]
times w [16 pairs of k, 16 columns]. Weights of 8 and 4 bits are exact in BF16. An FP32 activation is split in two BF16
numbers, of which the second is the rounding error of the first: together they keep 16 bits of it (relative error
2^-17), and the product is taken for both. Tiles treat subnormal BF16 numbers as zero, so decoders shift the exponents
of weights but never leave the normal range.

Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter "Intel AMX"; the split follows
Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype", arXiv 1904.06376.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.decode import E4M3_SHIFT, e4m3_as_bf16
from moec.codegen.tvm.tir import Kernel, Machine, Param, const, intrinsic, kernel_body, splat
from moec.codegen.tvm.vector import f32_to_bf16
from moec.ir.lane16 import Format

LANES = 16  # 4-byte lanes of a tile's row
TILE = 256  # 4-byte lanes of a whole tile
STEP = 32  # k of one tile
_STRIDE = 64  # bytes from one row of a tile to the next


def _emit(name: str, *args: Any) -> None:
    T.evaluate(intrinsic(f"llvm.x86.{name}", *[const(a, "int8") if isinstance(a, int) else a for a in args]))


def configure(rows: Any) -> None:
    """Tiles 0 .. 5 (sums and activations) get `rows` <= 16 rows, tiles 6 and 7 (weights) 16; all rows 64 bytes."""
    config = T.alloc_buffer((16,), "int32", scope="global")
    lowest = T.Bind(rows * const(0x01010101))
    words = [const(1), *[const(0)] * 3, *[const(64 * 0x10001)] * 4, *[const(0)] * 4]
    weights = T.bitwise_or(T.bitwise_and(lowest, const(0xFFFF)), const(0x10100000))
    for i, word in enumerate([*words, lowest, weights, const(0), const(0)]):
        T.buffer_store(config, word, [i])
    _emit("ldtilecfg", T.address_of(config[0]))


def release() -> None:
    """Give the tiles back: a thread that holds none is cheaper to switch."""
    _emit("tilerelease")


def zero(tile: int) -> None:
    """tile = 0."""
    _emit("tilezero", tile)


def load(tile: int, pointer: Any, stride: int = _STRIDE) -> None:
    """tile = rows of 64 bytes at `pointer`, `stride` bytes apart."""
    _emit("tileloadd64", tile, pointer, const(stride, "int64"))


def store(tile: int, pointer: Any, stride: int = _STRIDE) -> None:
    """Store the rows of a tile, `stride` bytes apart."""
    _emit("tilestored64", tile, pointer, const(stride, "int64"))


def dot(sums: int, x: int, w: int) -> None:
    """sums += x . w."""
    _emit("tdpbf16ps", sums, x, w)


def weight_rows(fmt: Format, lines: list[Any], use: Callable[[int, list[Any]], None]) -> None:
    """Emit `use(i, rows)` for each packed vector of `lines`: rows of a BF16 tile, float32x16 in type; true value =
    row * `post_scale`."""
    if fmt.bits != 8:
        widen = {"bf16": _bf16_rows, "fp4_e2m1": _fp4_rows}[fmt.name]
        for i, v in enumerate(lines):
            use(i, widen(v))
        return
    # Subnormal numbers are rare and take twice the instructions.
    magnitude, zero = splat(0x78, 64, "int8"), splat(0, 64, "int8")
    small = [T.bitwise_and(T.reinterpret("int8x64", v), magnitude) == zero for v in lines]
    some = reduce(T.Or, small)
    with T.If(intrinsic("llvm.vector.reduce.or", some, returns="bool")):
        with T.Then():
            for i, v in enumerate(lines):
                use(i, _fp8_rows(v))
        with T.Else():
            for i, v in enumerate(lines):
                use(i, _normal_fp8_rows(v))


def _bf16_rows(v: Any) -> list[Any]:
    return [T.reinterpret("float32x16", v)]


def _fp4_rows(v: Any) -> list[Any]:
    # An index is the low five bits of 16: the fifth belongs to the next number and does not matter.
    table = T.Bind(T.Shuffle([const(bits, "int16") for bits in _E2M1 * 2], [const(i) for i in range(32)]))
    four = T.Bind(T.reinterpret("int16x32", v))
    indices = [T.shift_right(four, splat(4 * i, 32, "int16")) if i else four for i in range(4)]
    name = "llvm.x86.avx512.permvar.hi.512"
    values = [intrinsic(name, table, index, returns="int16x32") for index in indices]
    return [T.Bind(T.reinterpret("float32x16", value)) for value in values]


_MORE = 8
"""Binary places by which E4M3 rows are smaller still than `e4m3_as_bf16` makes them: an exponent of four bits plus 16
needs no addition, plus 8 would."""


def _fp8_rows(v: Any) -> list[Any]:
    larger = splat(_MORE << 7, 32, "int16")
    zero = splat(0, 32, "int16")
    out = []
    for pairs in e4m3_as_bf16(v):
        mantissa = T.bitwise_and(pairs, splat(0x7FFF, 32, "int16"))
        out.append(T.reinterpret("float32x16", T.Select(mantissa == zero, pairs, pairs + larger)))
    return out


def _normal_fp8_rows(v: Any) -> list[Any]:
    half = T.Bind(T.reinterpret("int16x32", v))
    out = []
    for bits in (T.shift_left(half, splat(8, 32, "int16")), half):
        kept = T.bitwise_and(T.shift_right(bits, splat(4, 32, "int16")), splat(0x87F0 - 0x10000, 32, "int16"))
        out.append(T.reinterpret("float32x16", T.bitwise_or(kept, splat(16 << 7, 32, "int16"))))
    return out


_MAGNITUDES = (0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0)
_E2M1 = (*_MAGNITUDES, *(bits - 0x8000 for bits in _MAGNITUDES))
"""BF16 bits of every E2M1 number, as signed integers."""
_FP8_POST = 2.0 ** (E4M3_SHIFT - _MORE)
_POST = {"bf16": 1.0, "fp8_e4m3": _FP8_POST, "fp8_e4m3_rows": _FP8_POST, "fp4_e2m1": 1.0}
_ORDER = {
    "bf16": (0, 1, 2, 3, 4, 5, 6, 7),
    "fp8_e4m3": (0, 2, 1, 3, 4, 6, 5, 7),
    "fp8_e4m3_rows": (0, 2, 1, 3, 4, 6, 5, 7),
    "fp4_e2m1": (0, 4, 1, 5, 2, 6, 3, 7),
}
"""Of eight consecutive k, the order in which `weight_rows` brings them."""


def multiplies(fmt: Format) -> bool:
    """Whether tiles can multiply by weights of this format: those that are exact in BF16."""
    return fmt.name in _POST


def post_scale(fmt: Format) -> float:
    """By what sums of x * weight_rows are to be multiplied; half of it goes to x, half to the result."""
    return _POST[fmt.name]


@cache
def split_row(fmt: Format, machine: Machine) -> Kernel:
    """One row of x as two rows of BF16 tiles, in the order of k that `weight_rows` has.

    Parameters: source f32[n], high and low (pointers to the row in the first tile), n, padded (i32, multiples of 32
    of which are written, zero beyond n), step (4-byte lanes from one tile to the next), factor (f32).
    """
    name = f"split_row_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [(n, "float32", (1 << 40,)) for n in ("source", "high", "low")]
    params += [("n", "int32"), ("padded", "int32"), ("step", "int32"), ("factor", "float32")]
    order = [k // 8 * 8 + _ORDER[fmt.name][k % 8] for k in range(STEP)]
    with kernel_body(kernel, params) as (source, high, low, n, padded, step, factor):

        def put(target: Any, values: list[Any], index: Any) -> list[Any]:
            """Store 32 values rounded to BF16; returns the rounding errors."""
            bits = [f32_to_bf16(v, LANES) for v in values]
            pairs = T.Shuffle(bits, [const(k) for k in order])
            T.buffer_store(target, T.reinterpret("float32x16", pairs), [T.ramp(index * step, 1, LANES)])
            wide = [T.shift_left(T.Cast("uint32x16", b), splat(16, LANES, "uint32")) for b in bits]
            return [T.Bind(v - T.reinterpret("float32x16", w)) for v, w in zip(values, wide, strict=True)]

        def split(buffer: Any, first: Any, index: Any) -> None:
            scale = T.broadcast(factor, LANES)
            values = [T.Bind(buffer.vload([first + h * LANES], "float32x16") * scale) for h in range(2)]
            put(low, put(high, values, index), index)

        whole = T.Bind(n // STEP)
        with T.serial(0, whole) as i:
            split(source, i * STEP, i)
        with T.If(whole * STEP < padded), T.Then():
            rest = T.alloc_buffer((STEP,), "float32", scope="global")
            with T.serial(0, padded // STEP - whole) as j:
                with T.serial(0, STEP) as i:
                    T.buffer_store(rest, const(0.0, "float32"), [i])
                with T.serial(0, T.max(T.min(n - (whole + j) * STEP, STEP), 0)) as i:
                    T.buffer_store(rest, source[(whole + j) * STEP + i], [i])
                split(rest, const(0), whole + j)
    return kernel
