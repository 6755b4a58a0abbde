"""Quantisation of activations as CPU kernels see it: rows rounded to E4M3 and widened again, exactly as torch casts.

    quantise_rows(x, y, rows)       y[r, j] = e4m3(x[r, j] / s) * s                          y may be x

with s = amax / 448 of the value's block, rounded up to a power of two first when `pow2`, 1 for a block of zeros and
never below the smallest normal number. A CPU has no FP8 products: the values that an FP8 device would multiply are kept
in FP32, so that products of them are the same up to the order of sums. E4M3: OCP OFP8 specification, revision 1.0;
blocks of 128: DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import (
    Variable,
    f32,
    fill,
    foreach,
    load,
    max_lanes,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    spread,
    store,
)

LARGEST = 448.0
TINY = 2.0**-126


@dataclass(frozen=True)
class QuantiseSpec:
    """`block` columns share a scale, 0: the whole row; `whole`: one scale for all rows. Row strides in elements."""

    width: int
    block: int
    whole: bool
    pow2: bool
    max_rows: int
    ldx: int
    ldy: int


def round_e4m3(value: Any, width: int) -> Any:
    """FP32 lanes of magnitude up to 448 rounded to the nearest E4M3 value, ties to even, subnormals included."""
    suffix = "" if width == 1 else f"x{width}"
    u32 = f"uint32{suffix}"
    value = T.Bind(value)
    bits = T.Bind(T.reinterpret(u32, value))
    odd = T.bitwise_and(T.shift_right(bits, fill(20, width, "uint32")), fill(1, width, "uint32"))
    kept = T.bitwise_and(bits + odd + fill(0x7FFFF, width, "uint32"), fill(0xFFF00000, width, "uint32"))
    normal = T.Bind(T.reinterpret(f32(width), kept))
    # Below 2^-6 values are multiples of 2^-9.
    small = T.Bind(T.nearbyint(value * fill(512.0, width)) * fill(1 / 512, width))
    return T.Bind(T.Select(magnitude(value, width) < fill(2.0**-6, width), small, normal))


def magnitude(value: Any, width: int) -> Any:
    """Absolute values."""
    return T.max(value, fill(0.0, width) - value)


def scale_of(amax: Any, pow2: bool) -> Any:
    """The scale of a block whose largest magnitude is the scalar `amax`."""
    scale = T.Bind(amax / const(LARGEST, "float32"))
    if pow2:
        bits = T.Bind(T.reinterpret("uint32", scale))
        up = T.bitwise_and(bits + const(0x7FFFFF, "uint32"), const(0x7F800000, "uint32"))
        scale = T.Bind(T.reinterpret("float32", up))
    return T.Bind(T.Select(amax > const(0.0, "float32"), T.max(scale, const(TINY, "float32")), const(1.0, "float32")))


def amax_of(x: Any, start: Any, extent: int, lanes: int) -> Any:
    """Largest magnitude of x[start : start + extent]."""
    best = {width: Variable(width, 0.0) for width in (lanes, 1)}

    def grow(i: Any, width: int) -> None:
        best[width].set(T.max(best[width].value, magnitude(load(x, start + i, width), width)))

    foreach(extent, lanes, grow)
    return T.Bind(T.max(max_lanes(T.Bind(best[lanes].value), lanes), best[1].value))


def build_quantise_rows(spec: QuantiseSpec, machine: Machine) -> Kernel:
    """quantise_rows(x, y, rows)."""
    kernel = new_kernel("quantise_rows", spec)
    lanes = machine.lanes
    with kernel_body(kernel, [*pointers("x", "y"), *scalars("rows")]) as (x, y, rows):

        def quantise(source: Any, target: Any, extent: int, scale: Any) -> None:
            def convert(i: Any, width: int) -> None:
                limit = fill(LARGEST, width)
                scaled = T.Bind(load(x, source + i, width) / spread(scale, width))
                bounded = T.max(T.min(scaled, limit), fill(-LARGEST, width))
                store(y, round_e4m3(bounded, width) * spread(scale, width), target + i, width)

            foreach(extent, lanes, convert)

        def by_block(r: Any) -> None:
            source, target = row(r, spec.ldx), row(r, spec.ldy)
            each_block(
                spec.width,
                spec.block or spec.width,
                lambda at, extent: quantise(
                    source + at, target + at, extent, scale_of(amax_of(x, source + at, extent, lanes), spec.pow2)
                ),
            )

        if spec.whole:
            largest = Variable(1, 0.0)
            with T.serial(0, rows) as r:
                largest.set(T.max(largest.value, amax_of(x, row(r, spec.ldx), spec.width, lanes)))
            scale = scale_of(T.Bind(largest.value), spec.pow2)
            with T.serial(0, rows) as r:
                quantise(row(r, spec.ldx), row(r, spec.ldy), spec.width, scale)
        else:
            parallel_rows(machine, rows, spec.max_rows, 4 * spec.width, by_block)
    return kernel


def each_block(width: int, block: int, body: Callable[[Any, int], None]) -> None:
    """`body(offset, extent)` for the whole blocks of a row, then for the rest."""
    whole = width // block
    if whole:
        with T.serial(0, whole) as b:
            body(T.Bind(b * block), block)
    if width % block:
        body(const(whole * block), width % block)
