"""A scheduled module as the device sees it: ops in the order in which they are issued, each on its stream.

Ops of one stream run one after the other; `event.wait` makes a stream wait for another. An op without a stream waits
for all streams, and all wait for it, as on CUDA's legacy default stream. What happens before what follows from vector
clocks (Lamport, 1978; Mattern, 1989) over this order alone, whatever the kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.ir.module import ENTRIES, Function, Module, Op, Value
from moec.ir.optable import OPS, OpDef, operand_type
from moec.ir.types import CacheType, IndexType, TensorType

CALLS = ("call", "repeat")
EVENTS = ("event.record", "event.wait")


@dataclass(eq=False)
class Storage:
    """What a value lies in: who wrote it (None: an argument of the entry), who reads it, its buffer.

    `number` is what an index is: a layer.
    """

    value: Value
    writer: Issued | None = None
    readers: list[Issued] = field(default_factory=list)
    buffer: int = -1
    number: int | None = None


@dataclass(eq=False)
class Issued:
    """One op of one call: `layer` is the index that the call was made with, None in the entry.

    `clock` counts the ops of each stream that have ended once this one starts; `number` is its place on its stream.
    """

    function: Function
    position: int
    op: Op
    layer: int | None
    stream: str
    number: int = 0
    clock: dict[str, int] = field(default_factory=dict)
    reads: list[Storage] = field(default_factory=list)
    writes: list[Storage] = field(default_factory=list)

    def before(self, later: Issued) -> bool:
        """Whether this op has ended for certain when `later` starts."""
        return later.clock.get(self.stream, 0) >= self.number


def scheduled(module: Module) -> bool:
    """Whether any op has a stream."""
    return any("stream" in op.attrs for _, op in module.ops())


def entries(module: Module) -> list[Function]:
    """The functions that the runtime calls; in a module without any of `ENTRIES`, those that no other calls."""
    if named := [module.functions[e] for e in ENTRIES if e in module.functions]:
        return named
    called = {str(op.attrs["func"]) for _, op in module.ops() if op.name in CALLS}
    return [f for f in module.functions.values() if f.name not in called]


def is_view(op: Op) -> bool:
    """Whether an op moves nothing: its results are parts or other shapes of its first operand."""
    if op.name in CALLS or op.name in EVENTS or not op.results or not op.operands:
        return False
    if any(not isinstance(r.type, TensorType) for r in op.results):
        return True
    rule = OPS[op.name]
    if type(rule).bytes_written is OpDef.bytes_written:  # writes its results, whatever their size
        return False
    types, results = [operand_type(o) for o in op.operands], [r.type for r in op.results]
    return not (rule.bytes_read(types, results, op.attrs) or rule.bytes_written(types, results, op.attrs))


def cache_part(function: Function, op: Op) -> object:
    """Whose rows of a cache an op works on: its micro-batch's, or those that the parts of one prompt share (None)."""
    return None if "prompt_parts" in function.attrs else op.attrs.get("micro_batch")


def cache_layer(issued: Issued) -> object:
    """The layer whose rows an op on a cache works on; None outside of layers."""
    index = next((s for s in issued.reads if isinstance(s.value.type, IndexType)), None)
    return index if index is None or index.number is None else index.number


class Tracer:
    """Walks an entry and all that it calls; `rounds` limits the layers of a `repeat` (None: all of them).

    Events carry clocks; a wait for an event that nobody has recorded is passed over, see `moec.ir.schedule`.
    """

    def __init__(self, module: Module, rounds: int | None = None) -> None:
        self.module = module
        self._rounds = rounds
        self._clocks: dict[str, dict[str, int]] = {}
        self._all: dict[str, int] = {}
        """Clock after the last op without a stream: every stream has at least this one."""
        self.events: dict[int, dict[str, int]] = {}

    def run(self, entry: Function) -> Iterator[Issued]:
        """The ops of the entry in the order of issue; views, calls and events included."""
        yield from self._function(entry, {a: Storage(a) for a in entry.args}, None)

    def _function(self, function: Function, env: dict[Value, Storage], layer: int | None) -> Iterator[Issued]:
        for position, op in enumerate(function.ops):
            if op.name in CALLS:
                yield from self._call(op, env)
                continue
            issued = Issued(function, position, op, layer, str(op.attrs.get("stream", "")))
            if op.name in EVENTS:
                issued.clock = dict(self._clock(issued.stream))
                yield issued
                self._event(issued)
                continue
            issued.reads = [env[v] for v in op.values() if v in env]
            if op.name == "index.affine" and issued.reads and issued.reads[0].number is not None:
                layer_of = int(str(op.attrs["scale"])) * issued.reads[0].number + int(str(op.attrs["offset"]))
                env[op.result] = Storage(op.result, number=layer_of)
                issued.clock = dict(self._clock(issued.stream))
                yield issued
                continue
            if is_view(op):
                source = env.get(op.operands[0]) if isinstance(op.operands[0], Value) else None
                env.update({r: source or Storage(r) for r in op.results})
                issued.clock = dict(self._clock(issued.stream))
                yield issued
                continue
            self._start(issued)
            placed = op.attrs.get("buffers", ())
            buffers = placed if isinstance(placed, tuple) else ()
            for i, r in enumerate(op.results):
                storage = Storage(r, issued, buffer=int(buffers[i]) if i < len(buffers) else -1)  # type: ignore[arg-type]
                issued.writes.append(storage)
                env[r] = storage
            yield issued
            for storage in issued.reads:
                storage.readers.append(issued)

    def _call(self, op: Op, env: dict[Value, Storage]) -> Iterator[Issued]:
        callee = self.module.functions[str(op.attrs["func"])]
        given = [env.setdefault(v, Storage(v)) if isinstance(v, Value) else None for v in op.operands]
        if op.name == "call":
            layers = [int(str(op.attrs["layer"]))]
        else:
            first, last = int(str(op.attrs["first"])), int(str(op.attrs["last"]))
            layers = list(range(first, last + 1))
            if self._rounds is not None:
                layers = layers[: self._rounds]
        results: list[Storage] = []
        for layer in layers:
            inner = {a: s or Storage(a) for a, s in zip(callee.args[1:], given, strict=True)}
            inner[callee.args[0]] = Storage(callee.args[0], number=layer)
            yield from self._function(callee, inner, layer)
            results = [inner[v] for v in callee.returns]
            given[: len(results)] = results
        env.update(zip(op.results, results, strict=True))

    def _clock(self, stream: str) -> dict[str, int]:
        return self._clocks.setdefault(stream, dict(self._all))

    def _start(self, issued: Issued) -> None:
        if not issued.stream:
            for clock in self._clocks.values():
                join(self._all, clock)
        clock = self._clock(issued.stream) if issued.stream else self._all
        issued.clock = dict(clock)
        issued.number = clock.get(issued.stream, 0) + 1
        clock[issued.stream] = issued.number
        if not issued.stream:
            for other in self._clocks.values():
                join(other, self._all)

    def _event(self, issued: Issued) -> None:
        event = int(str(issued.op.attrs["event"]))
        if issued.op.name == "event.record":
            self.events[event] = dict(self._clock(issued.stream))
        elif event in self.events:
            join(self._clock(issued.stream), self.events[event])


def join(clock: dict[str, int], other: dict[str, int]) -> None:
    """The later of both for each stream, in place."""
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def is_cache(storage: Storage) -> bool:
    """Whether a storage is a cache: written in place, at places that differ between micro-batches."""
    return isinstance(storage.value.type, CacheType)
