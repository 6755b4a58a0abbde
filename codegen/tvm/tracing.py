"""Traced programs: after every op, copies of its results in one long buffer, for each layer of a `repeat`.

A value's memory is soon used again (see `memory`), so what an op computed can be seen only by copying it at once. Views
compute nothing and are left out. Elements are 4-byte words, integers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.emit import FunctionEmitter, Program, emitter
from moec.codegen.tvm.memory import Layout
from moec.codegen.tvm.tir import const
from moec.ir import Dim, Function, Module, Op, TensorType, Value


@dataclass(frozen=True)
class TracePoint:
    """Where a result of an op lies in the trace: `offset` in words, rows contiguous; `layer` is None outside layers.

    `op` and `result` count from 0. `shape` is symbolic: only as many rows are written as the call has.
    """

    function: str
    layer: int | None
    op: int
    result: int
    offset: int
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class _Frame:
    """The results of one function: first word of each traced result, and words in all."""

    offsets: Mapping[Value, int]
    words: int


class Tracer:
    """The layout of the trace of one entry function.

    `symbols` are the greatest sizes of a call; a traced call starts with an empty cache, so S is at most T.
    """

    output = "trace"
    dtype = "float32"

    def __init__(self, module: Module, entry: Function, symbols: Mapping[str, int]) -> None:
        self._symbols = {**symbols, "S": symbols["T"]}
        self.points: list[TracePoint] = []
        self.frame = self._frame(entry)
        self.layers: dict[Op, tuple[int, _Frame]] = {}
        self.words = self.frame.words
        self._note(entry, self.frame, None, 0)
        for op in entry.ops:
            if op.name == "repeat":
                callee = module.functions[str(op.attrs["func"])]
                frame = self._frame(callee)
                self.layers[op] = (self.words, frame)
                for layer in range(int(op.attrs["first"]), int(op.attrs["last"]) + 1):  # type: ignore[arg-type]
                    self._note(callee, frame, layer, self.words)
                    self.words += frame.words

    def _frame(self, function: Function) -> _Frame:
        offsets: dict[Value, int] = {}
        words = 0
        for op in function.ops:
            for value in computed(op):
                assert isinstance(value.type, TensorType)
                offsets[value] = words
                words += prod(value.type.bound(self._symbols), start=1)
        return _Frame(offsets, words)

    def _note(self, function: Function, frame: _Frame, layer: int | None, base: int) -> None:
        for index, op in enumerate(function.ops):
            for value in computed(op):
                assert isinstance(value.type, TensorType)
                shape = tuple(map(str, value.type.shape))
                result, offset = op.results.index(value), base + frame.offsets[value]
                self.points.append(TracePoint(function.name, layer, index, result, offset, shape, value.type.dtype))

    def emitter(
        self, program: Program, module: Module, function: Function, layout: Layout, base: int, frame: _Frame, sink: Any
    ) -> TracingEmitter:
        """The emitter of one function, whose frame is `frame`."""
        return TracingEmitter(program, module, function, layout, base, frame, sink)


def computed(op: Op) -> list[Value]:
    """The results whose elements the op's kernels write."""
    if op.name in ("split", "unflatten", "flatten", "repeat"):
        return []
    # Sorted rows are never copied: products gather them by the index of their token.
    return op.results[1:] if op.name == "moe.dispatch" else op.results


class TracingEmitter(FunctionEmitter):
    """Emits ops as FunctionEmitter does, and behind each a copy of its results to `sink`, `origin` words in."""

    def __init__(
        self, program: Program, module: Module, function: Function, layout: Layout, base: int, frame: _Frame, sink: Any
    ) -> None:
        super().__init__(program, module, function, layout, base)
        self.frame = frame
        self.sink = sink
        self.origin: Any = const(0, "int64")

    def emit(self) -> None:
        """Emit all ops in order, each with the copy of its results."""
        for op in self.function.ops:
            self.op = op
            emitter(op.name)(self, op)
            for value in computed(op):
                self._keep(value)

    def _keep(self, value: Value) -> None:
        place = self.place(value)
        assert isinstance(value.type, TensorType)
        rows = self.count(value) if isinstance(value.type.shape[0], Dim) else place.shape[0]
        buffer, first = self.buffer_of(value)

        def copy(dim: int, source: Any, target: Any) -> None:
            if dim == len(place.shape):
                T.buffer_store(self.sink, buffer[source], [target])
                return
            step = prod(place.shape[dim + 1 :], start=1)
            with T.serial(0, place.shape[dim] if dim else rows) as i:
                wide = T.Cast("int64", i)
                copy(dim + 1, source + wide * const(place.strides[dim], "int64"), target + wide * const(step, "int64"))

        copy(0, const(first, "int64"), self.origin + const(self.frame.offsets[value], "int64"))
