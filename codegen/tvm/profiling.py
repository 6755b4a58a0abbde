"""Profiled programs: after every op, the machine's tick counter in one long buffer, for each layer of a `repeat`.

Views take no time and are left out. The first word is the counter at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter, Program
from moec.codegen.tvm.memory import Layout
from moec.codegen.tvm.tir import Machine, const, intrinsic
from moec.ir import Function, Module, Op

VIEWS = ("split", "unflatten", "flatten", "repeat")


@dataclass(frozen=True)
class ProfilePoint:
    """The op that ended when word `word` was written; `op` counts from 0, `layer` is None outside layers."""

    function: str
    layer: int | None
    op: int
    name: str
    word: int


@dataclass(frozen=True)
class _Frame:
    """First word of one function's ops."""

    ops: dict[Op, int]
    words: int


class Profiler:
    """The layout of the ticks of one entry function, in the order in which ops run."""

    output = "ticks"
    dtype = "int64"

    def __init__(self, module: Module, entry: Function) -> None:
        self.points: list[ProfilePoint] = []
        self.layers: dict[Op, tuple[int, _Frame]] = {}
        self.words = 1
        ops: dict[Op, int] = {}
        for index, op in enumerate(entry.ops):
            if op.name == "repeat":
                callee = module.functions[str(op.attrs["func"])]
                timed = [o for o in callee.ops if o.name not in VIEWS]
                frame = _Frame({o: i for i, o in enumerate(timed)}, len(timed))
                self.layers[op] = (self.words, frame)
                for layer in range(int(op.attrs["first"]), int(op.attrs["last"]) + 1):  # type: ignore[arg-type]
                    for o in timed:
                        self._note(callee, layer, callee.ops.index(o), o)
            elif op.name not in VIEWS:
                ops[op] = self.words
                self._note(entry, None, index, op)
        self.frame = _Frame(ops, 0)

    def _note(self, function: Function, layer: int | None, index: int, op: Op) -> None:
        self.points.append(ProfilePoint(function.name, layer, index, op.name, self.words))
        self.words += 1

    def emitter(
        self, program: Program, module: Module, function: Function, layout: Layout, base: int, frame: _Frame, sink: Any
    ) -> ProfilingEmitter:
        """The emitter of one function, whose frame is `frame`."""
        emitter = ProfilingEmitter(program, module, function, layout, base)
        emitter.frame, emitter.sink = frame, sink
        return emitter


class ProfilingEmitter(FunctionEmitter):
    """Emits ops as FunctionEmitter does, and behind each a reading of the tick counter."""

    frame: _Frame
    sink: Any
    origin: Any = None

    def emit(self) -> None:
        """Emit all ops in order."""
        if self.origin is None:
            self.origin = const(0, "int64")
            T.buffer_store(self.sink, ticks(self.p.machine), [const(0, "int64")])
        for op in self.function.ops:
            self.op = op
            EMITTERS[op.name](self, op)
            if op in self.frame.ops:
                T.buffer_store(self.sink, ticks(self.p.machine), [self.origin + self.frame.ops[op]])


def ticks(machine: Machine) -> Any:
    """The counter that runs at a constant rate and that programs may read, int64."""
    name = "llvm.readcyclecounter" if machine.mcpu.startswith("x86") else "llvm.readsteadycounter"
    return intrinsic(name, returns="int64")
