"""One native function a phase: the program that calls all kernels of a step, layer loops included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec.codegen.storage import stored_arrays
from moec.codegen.tvm.emit import FunctionEmitter, Program, WeightBuffer, extra_sizes
from moec.codegen.tvm.memory import Layout, loop_result, plan_function, symbol_bounds
from moec.codegen.tvm.profiling import ProfilePoint, Profiler
from moec.codegen.tvm.recording import Record, Routers
from moec.codegen.tvm.tir import Kernel, Machine, const
from moec.codegen.tvm.tracing import TracePoint, Tracer
from moec.ir import CacheType, Function, Module, Op, TensorType, Value, WeightRef

OUTPUTS = ("logits", "states")
TIR_TYPES = {"f32": "float32", "bf16": "uint16", "i32": "int32"}


@dataclass
class Entry:
    """How the runtime calls one phase; `args` in call order, see docs/artifact.md."""

    symbol: str
    max_tokens: int
    max_rows: int
    args: list[dict[str, Any]] = field(default_factory=list)
    routers: Routers | None = None

    def as_json(self) -> dict[str, Any]:
        """The entry as it stands in plan.json."""
        return {
            "symbol": self.symbol,
            "max_tokens": self.max_tokens,
            "max_rows": self.max_rows,
            "args": self.args,
            **({"routing": self.routers.as_json()} if self.routers else {}),
        }


@dataclass
class Phase:
    """A built phase: its exported function, the kernels that it calls, how to call it."""

    entry: Entry
    function: Any
    kernels: list[Kernel]
    uses: dict[str, set[str]]
    points: list[TracePoint | ProfilePoint] = field(default_factory=list)
    """Where the watched output holds what."""


@dataclass(frozen=True)
class Sizes:
    """Limits of one phase: tokens and wanted rows of a call, context, sequences, page size, pages of the cache."""

    max_tokens: int
    max_rows: int
    context: int
    batch: int
    page: int
    pages: int


def build_phase(
    module: Module,
    name: str,
    sizes: Sizes,
    machine: Machine,
    watch: str = "",
    kernels: dict[str, Kernel] | None = None,
) -> Phase:
    """Emit the entry function `name` of a module whose ops all have kernels.

    `kernels` are those built so far, which all entries of a library share: a name stands for one kernel there.

    With `watch` it has one more output: "trace" f32[words], into which the results of every op are copied (such a
    program is called for a sequence's first tokens only), or "ticks" i64[words], the time after every op.
    """
    function = module.functions[name]
    kv = next(a for a in function.args if isinstance(a.type, CacheType))
    # Logits, and of a model that is drafted for its hidden states.
    outputs = {v: Value(name, v.type) for name, v in zip(OUTPUTS, function.returns, strict=False)}
    symbols = symbol_bounds(sizes.max_tokens, sizes.max_rows, sizes.context, sizes.batch, sizes.page)
    layout = plan_function(function, symbols, extra_sizes(function.ops, symbols), outputs)
    layers = _layer_layouts(module, function, symbols)
    layer_size = max((lay.size for lay in layers.values()), default=0)
    limits = {**symbols, "rank": _rank(module), "index": _index_key(module)}
    watcher: Tracer | Profiler | None = None
    if watch:
        watcher = Tracer(module, function, symbols) if watch == "trace" else Profiler(module, function)
    # What a watched program routes is in its trace already.
    routers = None if watch else Routers.of(module, function)
    entry = Entry(name, sizes.max_tokens, sizes.max_rows, routers=routers)
    # Scratch stands last, and how much of it there is shows only once everything is emitted: build twice.
    scratch = 0
    for _ in range(2):
        entry.args = []
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            env = _inputs(entry, function, kv, sizes.pages)
            arena = layout.size + layer_size
            workspace = _array(entry, "workspace", "workspace", "float32", (arena + scratch,))
            results = {v: _output(entry, v, env.sizes) for v in outputs.values()}
            words = _array(entry, watcher.output, "output", watcher.dtype, (watcher.words,)) if watcher else None
            routed = routed_output(entry, routers, sizes) if routers else None
            arrays = {w: _weight_arrays(entry, module, w) for w in _used_weights(module, function)}
            # Every argument is declared: from here on views of them may be.
            weights = {w: _weight(module, w, a) for w, a in arrays.items()}
            counts, shared = env.counts(), {} if kernels is None else kernels
            program = Program(machine, limits, sizes.page, workspace, weights, counts, shared, scratch_at=arena)
            loops = _Loops(program, module, layers, layout.size, routers, routed, sizes.max_tokens)
            if watcher is None:
                emitter = FunctionEmitter(program, module, function, layout, 0)
            else:
                sink = _flat(words)
                loops = _WatchedLoops(program, module, layers, layout.size, watcher, sink)
                emitter = watcher.emitter(program, module, function, layout, 0, watcher.frame, sink)  # type: ignore[arg-type]
            emitter.env = env.views()
            emitter.env |= {v: (_flat(out), 0) for v, out in results.items()}
            emitter.repeat = loops
            emitter.emit()
        scratch = program.scratch_size
    points: list[TracePoint | ProfilePoint] = [*watcher.points] if watcher else []
    return Phase(entry, builder.get(), list(program.kernels.values()), program.uses, points)


def _rank(module: Module) -> int:
    """Width of what stands first in a cached position: the latent, or the keys of all heads."""
    for _, op in module.ops():
        if op.name in ("cache.append", "cache.append_heads"):
            first = op.operands[2].type
            assert isinstance(first, TensorType)
            return prod(d for d in first.shape[1:] if isinstance(d, int))
    raise AssertionError("a model without a cache")


def _index_key(module: Module) -> int:
    """Width of the index key at the end of a cached position; 0 without."""
    keys = (op.operands[2].type for _, op in module.ops() if op.name == "cache.append_index")
    return next((int(k.shape[1]) for k in keys if isinstance(k, TensorType)), 0)  # type: ignore[arg-type]


def _layer_layouts(module: Module, function: Function, symbols: Mapping[str, int]) -> dict[str, Layout]:
    out = {}
    for op in function.ops:
        if op.name == "repeat":
            callee = module.functions[str(op.attrs["func"])]
            out[callee.name] = plan_function(callee, symbols, extra_sizes(callee.ops, symbols), loop_result(callee))
    return out


class _Loops:
    """Emits a `repeat`: a serial loop over layers around the body of the layer function, state in place."""

    def __init__(
        self, program: Program, module: Module, layouts: Mapping[str, Layout], base: int,
        routers: Routers | None = None, routed: Any = None, most: int = 0,
    ) -> None:  # fmt: skip
        self.program = program
        self.module = module
        self.layouts = layouts
        self.base = base
        self.routers, self.routed, self.most = routers, routed, most

    def __call__(self, op: Op, outer: FunctionEmitter) -> None:
        callee = self.module.functions[str(op.attrs["func"])]
        layout = self.layouts[callee.name]
        with T.serial(int(op.attrs["first"]), int(op.attrs["last"]) + 1) as layer:  # type: ignore[arg-type]
            inner = self._emitter(op, callee, layout, layer)
            inner.env[callee.args[0]] = layer
            if self.routers is not None and self.routed is not None:
                inner.record = Record.of_layer(self.routers, _flat(self.routed), self.most, self.module, op, layer)
            for arg, operand in zip(callee.args[1:], op.operands, strict=True):
                inner.env[arg] = self._argument(outer, operand)
            inner.emit()
            inner.finish(callee.returns[0], callee.args[1])

    def _emitter(self, op: Op, callee: Function, layout: Layout, layer: Any) -> FunctionEmitter:
        return FunctionEmitter(self.program, self.module, callee, layout, self.base)

    def _argument(self, outer: FunctionEmitter, operand: Value | WeightRef) -> Any:
        if isinstance(operand, WeightRef):
            return self.program.weights[operand.name].data, 0
        if isinstance(operand.type, CacheType):
            return outer.env[operand]
        return outer.buffer_of(operand)


class _WatchedLoops(_Loops):
    """Such loops whose every layer has its own part of what is watched."""

    def __init__(
        self,
        program: Program,
        module: Module,
        layouts: Mapping[str, Layout],
        base: int,
        watcher: Tracer | Profiler,
        sink: Any,
    ) -> None:
        super().__init__(program, module, layouts, base)
        self.watcher = watcher
        self.sink = sink

    def _emitter(self, op: Op, callee: Function, layout: Layout, layer: Any) -> FunctionEmitter:
        origin, frame = self.watcher.layers[op]
        emitter = self.watcher.emitter(self.program, self.module, callee, layout, self.base, frame, self.sink)  # type: ignore[arg-type]
        number = T.Cast("int64", layer - int(op.attrs["first"]))  # type: ignore[arg-type]
        emitter.origin = const(origin, "int64") + number * const(frame.words, "int64")
        return emitter


@dataclass
class _Inputs:
    buffers: dict[Value, Any]
    sizes: dict[str, Any]
    pages: int

    def views(self) -> dict[Value, Any]:
        """Flat views with the first element of each (of the cache: with its number of pages)."""
        return {v: (_flat(b), self.pages if isinstance(v.type, CacheType) else 0) for v, b in self.buffers.items()}

    def counts(self) -> dict[str, Any]:
        """Run-time sizes: tokens, wanted rows, and the cached positions of the one sequence of a prefill call."""
        (starts,) = [b for v, b in self.buffers.items() if v.name == "starts"]
        return {"T": self.sizes["T"], "R": self.sizes["R"], "S": T.Bind(starts[1])}


def _inputs(entry: Entry, function: Function, kv: Value, pages: int) -> _Inputs:
    """Declare the inputs and the cache."""
    sizes = {n: T.int32() for n in ("T", "R", "B", "N", "B + 1")}
    buffers: dict[Value, Any] = {}
    for arg in function.args:
        if isinstance(arg.type, TensorType):
            dtype = "int32" if arg.type.dtype == "i32" else "float32"
            buffers[arg] = _matched(entry, arg.name, "input", dtype, _dims(arg.type), sizes)
    assert isinstance(kv.type, CacheType)
    layers, _, page, width = kv.type.shape
    dtype, row = ("uint8", kv.type.row_bytes()) if kv.type.quant else (TIR_TYPES[kv.type.dtype], width)
    buffers[kv] = _matched(entry, "kv", "cache", dtype, (layers, pages, page, row), sizes)
    return _Inputs(buffers, sizes, pages)


def _dims(t: Any) -> list[Any]:
    """The dims of a tensor type: numbers, and symbols by their name."""
    return [d if isinstance(d, int) else str(d) for d in t.shape]


def _output(entry: Entry, value: Value, sizes: Mapping[str, Any]) -> Any:
    return _matched(entry, value.name, "output", "float32", _dims(value.type), sizes)


def _flat(buffer: Any) -> Any:
    """The same memory as one dimension, addressed by 64-bit element numbers."""
    return T.decl_buffer((1 << 40,), buffer.dtype, data=buffer.data, align=4)


def _matched(entry: Entry, name: str, kind: str, dtype: str, shape: Sequence[Any], sizes: Mapping[str, Any]) -> Any:
    handle = T.arg(name, T.handle())
    entry.args.append({"name": name, "kind": kind, "dtype": dtype, "shape": list(shape)})
    dims = [sizes[d] if isinstance(d, str) else int(d) for d in shape]
    return T.match_buffer(handle, dims, dtype, align=4)


def _array(entry: Entry, name: str, kind: str, dtype: str, shape: tuple[int, ...]) -> Any:
    return _matched(entry, name, kind, dtype, shape, {})


def routed_output(entry: Entry, routers: Routers, sizes: Sizes) -> Any:
    """Declare the output that takes the routers' choices."""
    return _array(entry, "routed", "output", "int32", (len(routers.layers), sizes.max_tokens, routers.top_k))


def _used_weights(module: Module, function: Function) -> list[str]:
    seen: dict[str, None] = {}
    for op in function.ops:
        if op.name == "repeat":
            seen.update(dict.fromkeys(_used_weights(module, module.functions[str(op.attrs["func"])])))
        seen.update(dict.fromkeys(o.name for o in op.operands if isinstance(o, WeightRef)))
    return [w for w in module.weights if w in seen]


def _weight_arrays(entry: Entry, module: Module, name: str) -> list[Any]:
    stored = stored_arrays(module.weights[name])
    return [_array(entry, a.name, "weight", a.lane_dtype, a.lane_shape) for a in stored]


def _weight(module: Module, name: str, arrays: Sequence[Any]) -> WeightBuffer:
    """A weight's arrays as flat views; a layer is a run of elements of each."""
    weight = module.weights[name]
    by_layer = bool(weight.indices) and weight.indices[0][0] == "l"
    first, stop = weight.indices[0][1:] if by_layer else (0, 1)
    elements = [a.lanes // (stop - first) for a in stored_arrays(weight)]
    views = [_flat(a) for a in arrays]
    return WeightBuffer(views[0], views[1] if views[1:] else None, elements[0], elements[1] if views[1:] else 0, first)


def kernel_table(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """The list for kernels.json: every kernel with the ops that use it."""
    uses: dict[str, set[str]] = {}
    for phase in phases:
        for name, ops in phase.uses.items():
            uses.setdefault(name, set()).update(ops)
    return [{"name": name, "ops": sorted(ops), "symbol": name} for name, ops in sorted(uses.items())]


def program_functions(phases: Sequence[Phase]) -> tuple[list[Kernel], dict[str, Any]]:
    """Kernels of all phases, each name once, and the exported functions."""
    kernels = {k.name: k for phase in phases for k in phase.kernels}
    return list(kernels.values()), {phase.entry.symbol: phase.function for phase in phases}
