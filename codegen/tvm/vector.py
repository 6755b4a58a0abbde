"""Vector idioms of the element-wise, router and attention kernels: loads of any width, sums, exp, parallel rows.

A "width" is a number of fp32 lanes; width 1 is a scalar, so that one body serves the vectors of a row and its tail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tvm
from numpy.polynomial import Chebyshev, Polynomial
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, Param, const, splat
from moec.errors import InputError

STORAGE = {"f32": "float32", "bf16": "uint16"}
"""Element formats of caches and tables, and the type their pointers are declared with."""


class KernelSpecError(InputError):
    """A kernel asked for what it cannot do."""

    template = "{kernel} kernel: {problem}"


def check_storage(kernel: str, dtype: str) -> None:
    """Refuse element formats without a `STORAGE` type."""
    if dtype not in STORAGE:
        raise KernelSpecError(kernel=kernel, problem=f"elements of {dtype}, can read {' and '.join(STORAGE)}")


UNBOUNDED = 1 << 40
"""Declared extent of a pointer parameter: its real size is the caller's; wider than 32 bits keeps offsets in int64."""

PARALLEL_ELEMENTS = 1 << 15
"""Elements of row-wise work from which waking the other cores (about 2 us) pays."""

_NOWHERE = (1 << 31) - 1

_LOG2E = math.log2(math.e)
_LOG2E_HIGH = 1.44269502162933349609375  # log2(e) rounded to fp32
_EXP2_COEFFICIENTS = (
    Chebyshev.interpolate(lambda f: 2.0**f, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial, domain=[-1, 1]).coef
)


def pointers(*names: str, dtype: str = "float32") -> list[Param]:
    """Pointer parameters of one element type."""
    return [(name, dtype, (UNBOUNDED,)) for name in names]


def scalars(*names: str) -> list[Param]:
    """int32 parameters."""
    return [(name, "int32") for name in names]


def new_kernel(prefix: str, spec: Any) -> Kernel:
    """A kernel named after every field of the dataclass `spec`, so that equal specs have equal names."""
    parts = [prefix]
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        text = str(int(value)) if isinstance(value, bool) else str(value)
        parts.append(f.name + text.replace("-", "m").replace("+", "").replace(".", "p"))
    name = "_".join(parts)
    return Kernel(name, tvm.ir.GlobalVar(name))


def allow_alias(kernel: Kernel) -> Kernel:
    """Withdraw the promise that pointers are distinct, for kernels whose output may be one of their inputs."""
    kernel.func = kernel.func.without_attr("tirx.noalias")
    return kernel


def f32(width: int) -> str:
    """The fp32 type of `width` lanes."""
    return "float32" if width == 1 else f"float32x{width}"


def fill(value: float | int, width: int, dtype: str = "float32") -> Any:
    """A constant of `width` lanes."""
    return const(value, dtype) if width == 1 else splat(value, width, dtype)


def spread(scalar: Any, width: int) -> Any:
    """`scalar` in every one of `width` lanes."""
    return scalar if width == 1 else T.broadcast(scalar, width)


def load(buffer: Any, offset: Any, width: int) -> Any:
    """`width` consecutive elements, bound to a name."""
    if width == 1:
        return T.Bind(buffer[offset])
    return T.Bind(buffer.vload([offset], f"{buffer.dtype}x{width}"))


def store(buffer: Any, value: Any, offset: Any, width: int) -> None:
    """Store `width` consecutive elements."""
    T.buffer_store(buffer, value, [offset if width == 1 else T.ramp(offset, 1, width)])


class Variable:
    """One mutable value of `width` lanes that LLVM keeps in a register."""

    def __init__(self, width: int, value: float | int = 0.0, dtype: str = "float32") -> None:
        # TVM puts small memory of the scope "global" on the stack; "local" is refused inside private functions.
        self._storage = T.alloc_buffer((1,), dtype if width == 1 else f"{dtype}x{width}", scope="global")
        self.set(fill(value, width, dtype))

    @property
    def value(self) -> Any:
        """The present value."""
        return self._storage[0]

    def set(self, value: Any) -> None:
        """Assign."""
        T.buffer_store(self._storage, value, [0])

    def add(self, value: Any) -> None:
        """Increase."""
        self.set(self.value + value)


def settle(value: Any, dtype: str = "int64") -> Any:
    """`value` behind a load, so that TVM does not expand it: simplifying nested index expressions gets very slow."""
    held = Variable(1, 0, dtype)
    held.set(value)
    return T.Bind(held.value)


def row(index: Any, stride: int) -> Any:
    """Element offset of row `index`, in int64: rows times stride may pass 2^31."""
    return T.Bind(T.Cast("int64", index) * const(stride, "int64"))


def foreach(extent: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(offset, width)` over a static extent: whole vectors of `lanes`, then the tail element by element."""
    whole = extent // lanes * lanes
    if whole:
        with T.serial(0, whole // lanes) as i:
            body(i * lanes, lanes)
    if extent > whole:
        with T.serial(whole, extent) as i:
            body(i, 1)


def parallel_rows(machine: Machine, rows: Any, max_rows: int, row_elements: int, body: Callable[[Any], None]) -> None:
    """`body(row)` for all rows, over the cores when there are enough elements, on the caller's core otherwise."""
    if machine.cores == 1 or max_rows == 1 or max_rows * row_elements < PARALLEL_ELEMENTS:
        with T.serial(0, rows) as r:
            body(r)
        return
    with T.If(rows * row_elements >= PARALLEL_ELEMENTS):
        with T.Then(), T.parallel(0, rows) as r:
            body(r)
        with T.Else(), T.serial(0, rows) as r:
            body(r)


def shuffle(vectors: list[Any], lanes: list[int]) -> Any:
    """The named lanes of the concatenated `vectors`."""
    return T.Bind(T.Shuffle(vectors, [const(i) for i in lanes]))


def reduce_lanes(vector: Any, width: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold the lanes of a vector (power-of-two width) pairwise; LLVM's own fp reduction is a serial chain."""
    while width > 1:
        width //= 2
        low = shuffle([vector], list(range(width)))
        high = shuffle([vector], list(range(width, 2 * width)))
        vector = T.Bind(combine(low, high))
    return vector


def sum_lanes(vector: Any, width: int) -> Any:
    """Sum of the lanes."""
    return reduce_lanes(vector, width, lambda a, b: a + b)


def max_lanes(vector: Any, width: int) -> Any:
    """Largest lane."""
    return reduce_lanes(vector, width, T.max)


def transpose(rows: list[Any], width: int) -> list[Any]:
    """The columns of `width` vectors of `width` lanes, by log2(width) rounds of interleaving."""
    half = width // 2
    low = [i for k in range(half) for i in (k, width + k)]
    high = [i + half for i in low]
    for _ in range(width.bit_length() - 1):
        rows = [shuffle([rows[k], rows[k + half]], order) for k in range(half) for order in (low, high)]
    return rows


def _exp2_parts(whole: Any, fraction: Any, width: int) -> Any:
    """2^(whole + fraction) for |fraction| <= 1/2 and -126 <= whole <= 128 (128 gives infinity)."""
    power = fill(_EXP2_COEFFICIENTS[-1], width)
    for c in reversed(_EXP2_COEFFICIENTS[:-1]):
        power = power * fraction + fill(c, width)
    suffix = "" if width == 1 else f"x{width}"
    bits = T.shift_left(T.Cast(f"int32{suffix}", whole) + fill(127, width, "int32"), fill(23, width, "int32"))
    return power * T.reinterpret(f32(width), bits)


def exp2(x: Any, width: int) -> Any:
    """2^x to about 1e-7 relative; 0 below -126, infinity from 128."""
    x = T.Bind(x)
    bounded = T.Bind(T.max(T.min(x, fill(128.0, width)), fill(-126.0, width)))
    whole = T.Bind(T.nearbyint(bounded))
    power = _exp2_parts(whole, T.Bind(bounded - whole), width)
    return T.Bind(T.Select(x < fill(-126.0, width), fill(0.0, width), power))


def exp(x: Any, width: int) -> Any:
    """e^x to about 1e-7 relative; 0 below -87.3, infinity above 88.72."""
    x = T.Bind(x)
    bounded = T.Bind(T.max(T.min(x, fill(88.8, width)), fill(-87.3, width)))
    whole = T.Bind(T.nearbyint(bounded * fill(_LOG2E_HIGH, width)))
    # log2(e) in two parts: the product's rounding error would otherwise grow with |x|.
    fraction = T.Bind(T.fma(bounded, fill(_LOG2E_HIGH, width), fill(0.0, width) - whole))
    fraction = T.Bind(fraction + bounded * fill(_LOG2E - _LOG2E_HIGH, width))
    power = _exp2_parts(whole, fraction, width)
    return T.Bind(T.Select(x < fill(-87.3, width), fill(0.0, width), power))


def sigmoid(x: Any, width: int) -> Any:
    """1 / (1 + e^-x)."""
    one = fill(1.0, width)
    return T.Bind(one / (one + exp(fill(0.0, width) - x, width)))


def bf16_to_f32(bits: Any, width: int) -> Any:
    """bf16 bit patterns (uint16) widened to fp32."""
    suffix = "" if width == 1 else f"x{width}"
    wide = T.shift_left(T.Cast(f"uint32{suffix}", bits), fill(16, width, "uint32"))
    return T.Bind(T.reinterpret(f32(width), wide))


def f32_to_bf16(value: Any, width: int) -> Any:
    """fp32 to bf16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    suffix = "" if width == 1 else f"x{width}"
    u32 = f"uint32{suffix}"
    bits = T.Bind(T.reinterpret(u32, value))
    lowest = T.bitwise_and(T.shift_right(bits, fill(16, width, "uint32")), fill(1, width, "uint32"))
    rounded = T.shift_right(bits + lowest + fill(0x7FFF, width, "uint32"), fill(16, width, "uint32"))
    kept = T.Select(value == value, rounded, fill(0x7FC0, width, "uint32"))
    return T.Bind(T.Cast(f"uint16{suffix}", kept))


def load_as_f32(buffer: Any, offset: Any, width: int) -> Any:
    """`width` elements of an fp32 buffer, or of bf16 bit patterns widened."""
    value = load(buffer, offset, width)
    return bf16_to_f32(value, width) if buffer.dtype == "uint16" else value


def store_from_f32(buffer: Any, value: Any, offset: Any, width: int) -> None:
    """Store fp32 lanes as the buffer's elements, rounded when they are bf16."""
    store(buffer, f32_to_bf16(T.Bind(value), width) if buffer.dtype == "uint16" else value, offset, width)


def argmax_row(x: Any, x0: Any, extent: int, lanes: int) -> tuple[Any, Any]:
    """(value, position) of the first largest of x[x0 : x0 + extent]; position >= extent if none is above -infinity."""
    best = {width: Variable(width, -math.inf) for width in (lanes, 1)}
    where = {width: Variable(width, _NOWHERE, "int32") for width in (lanes, 1)}

    def compare(i: Any, width: int) -> None:
        value = load(x, x0 + i, width)
        position = i if width == 1 else T.ramp(i, 1, width)
        before = T.Bind(best[width].value)
        where[width].set(T.Select(value > before, position, where[width].value))
        best[width].set(T.Select(value > before, value, before))

    foreach(extent, lanes, compare)
    top = T.Bind(T.max(max_lanes(best[lanes].value, lanes), best[1].value))
    nowhere = fill(_NOWHERE, lanes, "int32")
    candidates = T.Bind(T.Select(best[lanes].value == T.broadcast(top, lanes), where[lanes].value, nowhere))
    tail = T.Select(best[1].value == top, where[1].value, const(_NOWHERE))
    return top, T.Bind(T.min(reduce_lanes(candidates, lanes, T.min), tail))
