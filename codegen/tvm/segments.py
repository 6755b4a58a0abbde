"""A phase of a sharded module: native functions between collectives, and the list of steps that runs them.

Values stay where the memory plan of the whole function puts them, in one workspace that every segment takes; a
collective reads and writes there, too. Sizes that are known only at run time (the layer, rows that were dispatched, a
rank's part of the tokens) come in the input `step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.arena import Slot
from moec.codegen.exchanged import comm_bounds
from moec.codegen.scheduled import CUTS, crossing, runs
from moec.codegen.tvm.emit import FunctionEmitter, Program, extra_sizes
from moec.codegen.tvm.emit import emitter as emitter_of
from moec.codegen.tvm.memory import Layout, loop_result, plan_function, symbol_bounds
from moec.codegen.tvm.program import (
    Entry,
    Phase,
    Sizes,
    _array,
    _flat,
    _index_key,
    _inputs,
    _layer_layouts,
    _Loops,
    _matched,
    _rank,
    _weight,
    _weight_arrays,
    routed_output,
)
from moec.codegen.tvm.recording import Record, Routers
from moec.codegen.tvm.tir import Kernel, Machine
from moec.ir import CacheType, Function, Module, Op, TensorType, Value, WeightRef
from moec.ir.module import Operand

STEP = ("layer", "D", "U")
"""Elements of the input `step`: the layer, rows dispatched to this rank, its part of the tokens."""


@dataclass(frozen=True)
class Frame:
    """A function with the places of its values: the entry, or a layer function called by `call` of the entry."""

    function: Function
    layout: Layout
    base: int
    outer: Frame | None = None
    call: Op | None = None

    def locate(self, value: Value) -> tuple[str, int]:
        """The buffer that holds a value, and its first element there."""
        place = self.layout.places[value]
        if isinstance(place.base, Slot):
            return "workspace", self.base + place.base.offset + place.offset
        if self.outer is None or self.call is None:
            return place.base.name, place.offset
        operand = self.call.operands[self.function.args.index(place.base) - 1]
        assert isinstance(operand, Value)
        buffer, first = self.outer.locate(operand)
        return buffer, first + place.offset

    def view(self, operand: Operand) -> dict[str, Any]:
        """How the runtime finds a tensor: buffer, first element, type, shape, elements from row to row."""
        assert isinstance(operand, Value) and isinstance(operand.type, TensorType)
        buffer, first = self.locate(operand)
        shape = [d if isinstance(d, int) else str(d) for d in operand.type.shape]
        ld = self.layout.places[operand].ld
        # Values of every other type are kept in FP32, rounded to what their type holds.
        dtype = "int32" if operand.type.dtype == "i32" else "float32"
        return {"buffer": buffer, "offset": first, "dtype": dtype, "shape": shape, "ld": ld}


@dataclass
class Segment:
    """Ops of a frame between two collectives; `last` ones of a layer function leave its result for the next layer."""

    symbol: str
    frame: Frame
    ops: list[Op]
    last: bool = False


@dataclass
class Steps:
    """The steps of a phase, as plan.json holds them, and its segments."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


def is_sharded(module: Module) -> bool:
    """Whether a module has collectives."""
    return any(op.name.startswith("comm.") for _, op in module.ops())


def build_segmented(
    module: Module, name: str, sizes: Sizes, machine: Machine, kernels: dict[str, Kernel]
) -> tuple[list[Phase], dict[str, Any]]:
    """The segments of entry `name`, and the entry as it stands in plan.json with its `steps`.

    `kernels` are those built so far, which segments of all entries share.
    """
    function = module.functions[name]
    symbols = symbol_bounds(sizes.max_tokens, sizes.max_rows, sizes.context, sizes.batch, sizes.page)
    symbols |= comm_bounds(module, sizes.max_tokens)
    (result,) = function.returns
    logits = Value("logits", result.type)
    layout = plan_function(function, symbols, extra_sizes(function.ops, symbols), {result: logits})
    entry = Frame(function, layout, 0)
    frames = {}
    for op in function.ops:
        if op.name == "repeat":
            callee = module.functions[str(op.attrs["func"])]
            # Segments that are cut for a schedule run in the order that each micro-batch has.
            kept = crossing(module, callee) if CUTS in callee.attrs else set()
            planned = plan_function(callee, symbols, extra_sizes(callee.ops, symbols), loop_result(callee), kept)
            frames[op] = Frame(callee, planned, layout.size, entry, op)
    routers = Routers.of(module, function)
    found = Steps()
    found.steps = _steps(module, entry, frames, found, name)
    arena = layout.size + max((f.layout.size for f in frames.values()), default=0)
    limits = {**symbols, "rank": _rank(module), "index": _index_key(module)}
    scratch = 0
    phases: list[Phase] = []
    # Scratch stands last and how much there is shows only once everything is emitted: build twice.
    for _ in range(2):
        emit = _Emission(module, function, sizes, machine, limits, arena, arena + scratch, logits, kernels, routers)
        phases = [emit.segment(s) for s in found.segments]
        scratch = max([scratch, *emit.scratch])
    args: dict[str, dict[str, Any]] = {}
    for phase in phases:
        args.update({a["name"]: a for a in phase.entry.args})
    described: dict[str, Any] = {"symbol": name, "max_tokens": sizes.max_tokens, "max_rows": sizes.max_rows}
    if routers:
        described["routing"] = routers.as_json()
    by_symbol = {p.entry.symbol: [a["name"] for a in p.entry.args] for p in phases}
    return phases, {**described, "args": list(args.values()), "steps": _with_args(found.steps, by_symbol)}


def _with_args(steps: list[dict[str, Any]], args: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    out = []
    for step in steps:
        if "segment" in step:
            out.append({**step, "args": args[step["segment"]]})
        elif "steps" in step:
            out.append({**step, "steps": _with_args(step["steps"], args)})
        else:
            out.append(step)
    return out


def _steps(module: Module, frame: Frame, frames: Mapping[Op, Frame], found: Steps, name: str) -> list[dict[str, Any]]:
    """Cut a function at its collectives and at layer functions that have some."""
    steps: list[dict[str, Any]] = []
    found_runs = list(runs(module, frame.function))
    for i, (kind, ops) in enumerate(found_runs):
        if kind == "collective":
            steps.append(_collective(frame, ops[0]))
        elif kind == "loop":
            inner = _steps(module, frames[ops[0]], {}, found, name)
            steps.append({"first": ops[0].attrs["first"], "last": ops[0].attrs["last"], "steps": inner})
        else:
            symbol = f"{name}_{len(found.segments)}"
            last = frame.outer is not None and i == len(found_runs) - 1
            found.segments.append(Segment(symbol, frame, ops, last))
            steps.append({"segment": symbol})
    return steps


def _collective(frame: Frame, op: Op) -> dict[str, Any]:
    inputs = [o for o in op.operands if isinstance(o, Value) and isinstance(o.type, TensorType)]
    views = [frame.view(o) for o in inputs]
    where = str(op.loc) if op.loc else frame.function.name
    return {
        "collective": op.name.removeprefix("comm."),
        "attrs": {k: list(v) if isinstance(v, tuple) else v for k, v in op.attrs.items()},
        "inputs": views,
        "outputs": [frame.view(r) for r in op.results],
        "where": where.removeprefix("loc(").removesuffix(")"),
    }


class _Emission:
    """Emits segments as functions of all integer inputs, the cache, the workspace, logits and their own weights."""

    def __init__(
        self, module: Module, function: Function, sizes: Sizes, machine: Machine, limits: Mapping[str, int], arena: int,
        workspace: int, logits: Value, kernels: dict[str, Kernel], routers: Routers | None,
    ) -> None:  # fmt: skip
        self.module = module
        self.function = function
        self.sizes = sizes
        self.machine = machine
        self.limits = limits
        self.arena = arena
        self.workspace = workspace
        self.logits = logits
        self.kernels = kernels
        self.routers = routers
        self.scratch: list[int] = []

    def segment(self, segment: Segment) -> Phase:
        """One exported function."""
        kv = next(a for a in self.function.args if isinstance(a.type, CacheType))
        entry = Entry(segment.symbol, self.sizes.max_tokens, self.sizes.max_rows)
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(segment.symbol)
            T.func_attr({"global_symbol": segment.symbol, "tirx.noalias": True})
            env = _inputs(entry, self.function, kv, self.sizes.pages)
            step = _array(entry, "step", "input", "int32", (len(STEP),))
            workspace = _array(entry, "workspace", "workspace", "float32", (self.workspace,))
            assert isinstance(self.logits.type, TensorType)
            vocab = int(self.logits.type.shape[1])  # type: ignore[arg-type]
            out = _matched(entry, "logits", "output", "float32", ("R", vocab), env.sizes)
            routes = self.routers is not None and self._routes(segment)
            routed = routed_output(entry, self.routers, self.sizes) if self.routers and routes else None
            arrays = {w: _weight_arrays(entry, self.module, w) for w in self._weights(segment)}
            weights = {w: _weight(self.module, w, a) for w, a in arrays.items()}
            rows = {**env.counts(), **{s: T.Bind(step[i]) for i, s in enumerate(STEP) if s != "layer"}}
            program = Program(
                self.machine,
                self.limits,
                self.sizes.page,
                workspace,
                weights,
                rows,
                self.kernels,
                scratch_at=self.arena,
            )
            frame = segment.frame
            outer = frame.outer or frame
            emitter = FunctionEmitter(program, self.module, outer.function, outer.layout, outer.base)
            emitter.env = env.views()
            emitter.env[self.logits] = (_flat(out), 0)
            if frame.outer is not None:
                layer = T.Bind(step[0])
                emitter = self._layer(program, frame, emitter, layer)
                if self.routers is not None and routed is not None and frame.call is not None:
                    most = self.sizes.max_tokens
                    emitter.record = Record.of_layer(self.routers, _flat(routed), most, self.module, frame.call, layer)
            else:
                emitter.repeat = self._loops(program, frame, segment.ops, routed)
            # Numbers of layers are no values in memory: every segment computes them for itself.
            numbers = [op for op in frame.function.ops if op.name == "index.affine" and op not in segment.ops]
            for op in [*numbers, *segment.ops]:
                emitter.op = op
                emitter_of(op.name)(emitter, op)
            if segment.last:
                emitter.finish(frame.function.returns[0], frame.function.args[1])
        self.scratch.append(program.scratch_size)
        return Phase(entry, builder.get(), list(program.kernels.values()), program.uses)

    def _layer(self, program: Program, frame: Frame, outer: FunctionEmitter, layer: Any) -> FunctionEmitter:
        """An emitter of a layer function whose arguments stand where the entry has them."""
        inner = FunctionEmitter(program, self.module, frame.function, frame.layout, frame.base)
        inner.env[frame.function.args[0]] = layer
        assert frame.call is not None
        for arg, operand in zip(frame.function.args[1:], frame.call.operands, strict=True):
            if isinstance(operand, WeightRef):
                if operand.name in program.weights:
                    inner.env[arg] = program.weights[operand.name].data, 0
            elif isinstance(operand.type, CacheType):
                inner.env[arg] = outer.env[operand]
            else:
                inner.env[arg] = outer.buffer_of(operand)
        return inner

    def _routes(self, segment: Segment) -> bool:
        """Whether the segment has a router, or calls a layer function that has one."""
        called = [self.module.functions[str(op.attrs["func"])].ops for op in segment.ops if op.name == "repeat"]
        return any(op.name == "moe.route" for ops in (segment.ops, *called) for op in ops)

    def _loops(self, program: Program, frame: Frame, ops: Sequence[Op], routed: Any) -> _Loops:
        """Native loops over the layers of functions without collectives."""
        function = Function(frame.function.name, frame.function.args, list(ops), [])
        layouts = _layer_layouts(self.module, function, self.limits)
        return _Loops(program, self.module, layouts, frame.layout.size, self.routers, routed, self.sizes.max_tokens)

    def _weights(self, segment: Segment) -> list[str]:
        """The weights that the segment's ops read, in the module's order."""
        given: dict[Value, str] = {}
        if segment.frame.call is not None:
            pairs = zip(segment.frame.function.args[1:], segment.frame.call.operands, strict=True)
            given = {arg: o.name for arg, o in pairs if isinstance(o, WeightRef)}
        used = set(_read(self.module, segment.ops, given))
        return [w for w in self.module.weights if w in used]


def _read(module: Module, ops: Sequence[Op], given: Mapping[Value, str]) -> list[str]:
    names: list[str] = []
    for op in ops:
        names += [o.name for o in op.operands if isinstance(o, WeightRef)]
        names += [given[o] for o in op.operands if isinstance(o, Value) and o in given]
        if op.name == "repeat":
            names += _read(module, module.functions[str(op.attrs["func"])].ops, {})
    return names
