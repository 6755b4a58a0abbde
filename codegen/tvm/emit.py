"""Emitting ops: each IR op becomes calls of kernels on places of the arena.

One function an op, in `emit_rows`, `emit_moe`, `emit_attention` and `emit_heads`; a kernel is chosen by the types of
the op and built once per distinct spec. What is not there cannot run on a CPU: `missing_ops` names it before anything
is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.arena import Slot
from moec.codegen.tvm import elementwise
from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.memory import Layout, Place
from moec.codegen.tvm.recording import Record
from moec.codegen.tvm.tir import Kernel, Machine, call, const
from moec.ir import CacheType, Dim, Function, Module, Op, TensorType, Value, WeightRef, lane16
from moec.ir.lane16 import Format
from moec.ir.module import Operand
from moec.plugins import plugins

DTYPES = {"f32": "float32", "bf16": "uint16", "i32": "int32"}


@dataclass
class WeightBuffer:
    """A weight as an argument of the program: flat buffers of stored elements and scales, and elements of one layer."""

    data: Any
    scale: Any | None
    layer_elements: int
    layer_scales: int
    first: int


@dataclass
class Program:
    """What all functions of one entry share while it is emitted."""

    machine: Machine
    limits: Mapping[str, int]
    page_size: int
    workspace: Any
    weights: Mapping[str, WeightBuffer]
    rows_of: Mapping[str, Any]
    """Run-time value of each leading symbol: T tokens, R rows, S cached positions."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    scratch_at: int = 0
    scratch_size: int = 0


class FunctionEmitter:
    """Emits the ops of one function into the current builder. `env` holds pointers and indices of its arguments."""

    def __init__(self, program: Program, module: Module, function: Function, layout: Layout, base: int) -> None:
        self.p = program
        self.module = module
        self.layout = layout
        self.base = base
        self.env: dict[Value, Any] = {}
        self.op: Op
        self.function = function
        self.repeat: Callable[[Op, FunctionEmitter], None] | None = None
        self.record: Record | None = None

    def emit(self) -> None:
        """Emit all ops in order."""
        for op in self.function.ops:
            self.op = op
            emitter(op.name)(self, op)

    def finish(self, returned: Value, argument: Value) -> None:
        """Leave the result of a layer where its input stood, for the next layer."""
        if self.place(returned).base is not argument:
            copy(self, returned, argument)

    # Addresses.

    def buffer_of(self, value: Value) -> tuple[Any, Any]:
        """Buffer and first element of a value that a layer function takes."""
        place = self.place(value)
        if isinstance(place.base, Slot):
            return self.p.workspace, self.base + place.base.offset + place.offset
        buffer, offset = self.env[place.base]
        return buffer, offset + place.offset

    def place(self, operand: Operand) -> Place:
        """The place of an SSA tensor value."""
        assert isinstance(operand, Value)
        return self.layout.places[operand]

    def at(self, operand: Operand, element: int = 0) -> Any:
        """Pointer to an element of the first row of a value."""
        place = self.place(operand)
        if isinstance(place.base, Slot):
            return T.address_of(self.p.workspace[self.base + place.base.offset + place.offset + element])
        buffer, offset = self.env[place.base]
        return T.address_of(buffer[offset + place.offset + element])

    def temporary(self, index: int) -> Any:
        """Pointer to an extra buffer of the current op."""
        return T.address_of(self.p.workspace[self.base + self.layout.extra[self.op][index].offset])

    def scratch(self, elements: int, behind: int = 0) -> Any:
        """Pointer to scratch memory that any kernel may use, `behind` fp32 elements (a multiple of 16) in it."""
        self.p.scratch_size = max(self.p.scratch_size, behind + elements)
        return T.address_of(self.p.workspace[self.p.scratch_at + behind])

    def weight(self, operand: Operand) -> list[Any]:
        """Pointers to a weight of the current layer: data, and scales when it has them."""
        assert isinstance(operand, WeightRef)
        w = self.p.weights[operand.name]
        layer: Any = const(0, "int64")
        if operand.indices:
            layer = T.Cast("int64", self.env[operand.indices[0]] - w.first)
        out = [T.address_of(w.data[layer * const(w.layer_elements, "int64")])]
        if w.scale is not None:
            out.append(T.address_of(w.scale[layer * const(w.layer_scales, "int64")]))
        return out

    def count(self, operand: Operand) -> Any:
        """Run-time number of rows of a value: `T`, or a multiple such as `T*8`."""
        assert isinstance(operand.type, TensorType)
        size = operand.type.shape[0]
        assert isinstance(size, Dim)
        factor, name = size.expr.as_coeff_Mul()
        return self.p.rows_of[str(name)] * int(factor) if factor != 1 else self.p.rows_of[str(name)]

    def most(self, operand: Operand) -> int:
        """Greatest number of rows of a value."""
        return self.place(operand).shape[0]

    def kernel(self, build: Callable[[Any, Machine], Kernel], spec: Any) -> Kernel:
        """The kernel of a spec, built on first use; notes which op uses it."""
        key = f"{build.__module__}.{build.__name__} {spec}"
        if key not in self.p.kernels:
            self.p.kernels[key] = build(spec, self.p.machine)
        kernel = self.p.kernels[key]
        self.p.uses.setdefault(kernel.name, set()).add(self.op.name)
        return kernel

    def run(self, build: Callable[[Any, Machine], Kernel], spec: Any, *args: Any) -> None:
        """Emit one kernel call."""
        call(self.kernel(build, spec), *args)

    def cache_layout(self, kv: Operand) -> CacheLayout:
        """The layout of the cache that an op uses, and pointer arithmetic's constants."""
        assert isinstance(kv.type, CacheType)
        rank = self.p.limits["rank"]
        width = int(kv.type.shape[3])  # type: ignore[arg-type]
        dtype = "fp8" if kv.type.quant else kv.type.dtype
        beside = self.p.limits["index"]
        return CacheLayout(rank, width - rank - beside, dtype, self.p.limits["N"], self.p.page_size, beside)

    def cache(self, kv: Operand, layer: Operand) -> Any:
        """Pointer to one layer of the cache."""
        assert isinstance(kv, Value) and isinstance(kv.type, CacheType) and isinstance(layer, Value)
        buffer, pages = self.env[kv]
        per_layer = const(pages * self.p.page_size * self.cache_layout(kv).row, "int64")
        return T.address_of(buffer[T.Cast("int64", self.env[layer]) * per_layer])


def format_of(t: Any) -> Format:
    """The storage format of a packed weight type."""
    assert isinstance(t, TensorType)
    return lane16.format_of(t.dtype, t.quant.block[-2] if t.quant else lane16.ROWS)


def matrix(t: Any) -> tuple[int, int]:
    """Rows and columns of a matrix (or of each of a stack)."""
    assert isinstance(t, TensorType)
    return int(t.shape[-2]), int(t.shape[-1])  # type: ignore[arg-type]


def integer(op: Op, name: str) -> int:
    """An attribute of an op that is an integer."""
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def number(op: Op, name: str) -> float:
    """An attribute of an op that is a number."""
    value = op.attrs[name]
    assert isinstance(value, int | float)
    return float(value)


def glu(op: Op) -> dict[str, Any]:
    """The attributes of a gated activation that the op has."""
    act = {"act": str(op.attrs["act"])} if "act" in op.attrs else {}
    return act | {key: number(op, key) for key in ("limit", "alpha", "shift") if key in op.attrs}


def copy(e: FunctionEmitter, x: Value, y: Value) -> None:
    """Copy the rows of `x` to where `y` stands; heads that lie apart, one by one."""
    p, q = e.place(x), e.place(y)
    apart = len(p.shape) == 3 and (p.strides[1], q.strides[1]) != (p.shape[2], p.shape[2])
    parts, width = (p.shape[1], p.shape[2]) if apart else (1, prod(p.shape[1:]))
    spec = elementwise.ScaleSpec(width, 1.0, p.shape[0], p.ld, q.ld)
    for part in range(parts):
        to = e.at(y, part * q.strides[1] if apart else 0)
        e.run(elementwise.build_scale, spec, e.at(x, part * p.strides[1] if apart else 0), to, e.count(x))


def _repeat(e: FunctionEmitter, op: Op) -> None:
    assert e.repeat is not None
    e.repeat(op, e)


def _view(e: FunctionEmitter, op: Op) -> None:
    """Views cost nothing."""


EMITTERS: dict[str, Callable[[FunctionEmitter, Op], None]] = {
    "repeat": _repeat,
    "split": _view,
    "unflatten": _view,
    "flatten": _view,
}
"""What emits an op, by its name; each `emit_` module adds its own."""


@cache
def _plugged() -> dict[str, Callable[[FunctionEmitter, Op], None]]:
    """Emitters of installed packages (entry points `moec.cpu_kernels`, named as their ops), found at the first use."""
    return dict(plugins("moec.cpu_kernels", EMITTERS))


def emitter(op: str) -> Callable[[FunctionEmitter, Op], None]:
    """What emits an op; `missing_ops` has been asked before."""
    return EMITTERS[op] if op in EMITTERS else _plugged()[op]


def missing_ops(module: Module) -> list[str]:
    """Ops of the module that have no CPU kernel; collectives need none."""
    names = {op.name for _, op in module.ops() if not op.name.startswith("comm.")}
    return sorted(names - {*EMITTERS, *_plugged()})


def extra_sizes(ops: Iterable[Op], symbols: Mapping[str, int]) -> dict[Op, list[int]]:
    """Elements of the buffers that an op's kernels pass between them, for the memory plan."""
    out: dict[Op, list[int]] = {}
    for op in ops:
        if op.name == "moe.route":
            out[op] = [symbols["T"] * matrix(op.operands[1].type)[0]]
        elif op.name == "moe.dispatch":
            (ids,) = [o for o in op.operands[1:2] if isinstance(o.type, TensorType)]
            assert isinstance(ids.type, TensorType)
            tokens, top_k = ids.type.bound(symbols)
            out[op] = [tokens * top_k]
        elif op.name == "moe.experts":
            rows = op.operands[0].type
            assert isinstance(rows, TensorType)
            wide, inter = matrix(op.operands[2].type)[0], matrix(op.operands[3].type)[1]
            n = rows.bound(symbols)[0]
            out[op] = [n * wide, n * inter]
    return out


# They need the names above, and add themselves to the table. Not the package does it: a library from the cache is used
# without TVM.
from moec.codegen.tvm import emit_attention, emit_heads, emit_moe, emit_rows  # noqa: E402, F401
