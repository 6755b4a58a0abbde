"""Schedules drawn at random, and machines of plain torch that run them: streams in any order that events allow, and
the turns of CPU ranks in the memory that they are given."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import moec
from moec.codegen.arena import Slot
from moec.codegen.scheduled import EXCHANGES, VIEWS, Steps, Turn, crossing, exchanges
from moec.codegen.tvm.memory import Layout, loop_result, plan_function, symbol_bounds
from moec.ir import Function, Module, Op, Value, WeightRef
from moec.ir.evaluate import Evaluator, WeightPrograms
from moec.ir.issue import CALLS, EVENTS, is_view
from moec.ir.mesh import mesh_of
from moec.ir.rewrite import clone_module
from moec.ir.spmd import run_ranks
from moec.passes.numerics.instance import CHUNKS, Inputs, Loader
from moec.passes.overlap import _replace
from moec.passes.planning import LayoutRequest
from moec.passes.streams.buffers import assign_buffers
from moec.passes.streams.events import add_events
from moec.passes.streams.rotate import Timing, rotate
from moec.passes.streams.tasks import _dependencies

LOADER = Loader()


class Stale(AssertionError):
    """Something is read that is not there yet, or no longer."""


def split_plan(model: str, layers: int, request: LayoutRequest, count: int, **sizes: str) -> Any:
    """A sharded decode in micro-batches without a schedule."""
    return moec.trace(model, {"num_hidden_layers": str(layers), **sizes}).optimize(
        "cpu", batch=4, context=16, layout=request, recipe="fp32",
        passes=[f"split-microbatches{{count={count},phase=decode}}"],
    )  # fmt: skip


def drawn(split: Module, seed: int) -> Module:
    """A schedule of the decode of a module in micro-batches: ops in a random order of their dependencies, layers in a
    pipeline of random depth, shared experts and exchanges on streams of their own in some."""
    draw = random.Random(seed)
    module = clone_module(split)
    entry = module.functions["decode"]
    streams = {
        "compute": "compute", "shared": draw.choice(["compute", "side"]), "comm.dispatch": "comm",
        "comm.combine": draw.choice(["comm", "comm", "back"]),
    }  # fmt: skip
    origin: dict[Op, Op] = {}
    for op in [o for o in entry.ops if o.name == "repeat"]:
        function = module.functions[str(op.attrs["func"])]
        if not exchanges(function):
            continue
        layers = int(str(op.attrs["last"])) - int(str(op.attrs["first"])) + 1
        while True:
            rounds = rotate(module, function, *_timing(function, streams, draw))
            if rounds.depth < layers:
                break
        _replace(module, entry, op, rounds)
        origin.update(rounds.origin)
        rounds.kernel.attrs |= {"interval_us": 1.0, "bound_us": 1.0}
    add_events(module, entry, origin)
    assign_buffers(module, entry, origin, dict.fromkeys(("T0", "T1", "T2", "D0", "D1", "D2", "S0", "S1", "S2"), 16))
    return module


def _timing(function: Function, streams: dict[str, str], draw: random.Random) -> tuple[dict[Op, Timing], float]:
    parts: dict[object, list[Op]] = {}
    for op in function.ops:
        parts.setdefault(op.attrs.get("micro_batch"), []).append(op)
    before = _dependencies(function)
    start: dict[Op, float] = {}
    longest = 0.0
    for ops in parts.values():
        now, left = 0.0, list(ops)
        # Early or late by kind, so that exchanges hide behind more or less.
        taste = {op: draw.random() for op in ops}
        while left:
            ready = [op for op in left if not set(before[op]) & set(left)]
            op = min(ready, key=lambda o: taste[o] + 0.3 * draw.random())
            left.remove(op)
            now += draw.random() * (5 if op.name in EXCHANGES else 1)
            start[op] = now
        longest = max(longest, now + 0.01)
    interval = longest * draw.choice([1.0, 1.0, 1.3, 2.0])
    late = {part: draw.choice([0.0, draw.random(), draw.random() * 2]) * interval for part in parts}

    def stream(op: Op) -> str:
        shared = any(isinstance(o, WeightRef) and "shared" in o.name for o in op.operands)
        return streams.get(op.name) or streams["shared" if shared else "compute"]

    return {
        op: Timing(us + late[op.attrs.get("micro_batch")], {"stream": stream(op)}) for op, us in start.items()
    }, interval


def mutated(module: Module, draw: random.Random) -> Module:
    """A copy with one change to the streams, events, order or buffers of a function, legal or not."""
    out = clone_module(module)
    functions = [f for f in out.functions.values() if any("stream" in op.attrs for op in f.ops)]
    f = draw.choice(functions)
    at = draw.randrange(len(f.ops))
    op = f.ops[at]
    events = [i for i, o in enumerate(f.ops) if o.name in EVENTS]
    how = draw.choice(["drop", "event", "move", "move", "buffer", "buffer", "stream", "number"])
    if how in ("drop", "event", "number") and events:
        at = draw.choice(events)
        op = f.ops[at]
    match how:
        case "drop" if op.name in EVENTS:
            del f.ops[at]
        case "number" if op.name in EVENTS:
            op.attrs["event"] = draw.choice([o.attrs["event"] for g in functions for o in g.ops if o.name in EVENTS])
        case "event" | "move":
            del f.ops[at]
            made = {r: i for i, o in enumerate(f.ops) for r in o.results}
            low = max((made[v] + 1 for v in op.values() if v in made), default=0)
            high = min((i for i, o in enumerate(f.ops) if set(op.results) & set(o.values())), default=len(f.ops))
            f.ops.insert(draw.randint(low, high), op)
        case "stream" if "stream" in op.attrs:
            op.attrs["stream"] = draw.choice(["compute", "comm", "side"])
        case "buffer":
            placed = [o for g in functions for o in g.ops if isinstance(o.attrs.get("buffers"), tuple)]
            one, other = draw.choice(placed), draw.choice(placed)
            given, taken = (list(o.attrs["buffers"]) for o in (one, other))  # type: ignore[arg-type]
            given[draw.randrange(len(given))] = draw.choice(taken)
            one.attrs["buffers"] = tuple(given)
    return out


@dataclass(eq=False)
class Instance:
    """An op of one call: its values are names in the machine's memory, numbers are layers."""

    op: Op
    env: dict[Value, Any]
    results: list[object]

    @property
    def stream(self) -> str:
        """Where it is issued; "" waits for all and all for it."""
        return str(self.op.attrs.get("stream", ""))


def _used(op: Op) -> Iterator[Value]:
    for operand in op.operands:
        yield from operand.indices if isinstance(operand, WeightRef) else (operand,)


def issued(module: Module, function: Function, env: dict[Value, Any]) -> Iterator[Instance]:
    """The ops of a function and of what it calls, in the order of issue; `env` gets the names of its values."""
    for op in function.ops:
        if op.name == "index.affine":
            (x,) = op.operands
            env[op.results[0]] = int(str(op.attrs["scale"])) * env[x] + int(str(op.attrs["offset"]))  # type: ignore[index]
        elif op.name in CALLS:
            callee = module.functions[str(op.attrs["func"])]
            given = [env[o] if isinstance(o, Value) else o for o in op.operands]
            first = int(str(op.attrs.get("layer", op.attrs.get("first"))))
            for layer in range(first, int(str(op.attrs.get("last", first))) + 1):
                inner = dict(zip(callee.args, [layer, *given], strict=True))
                yield from issued(module, callee, inner)
                given[: len(op.results)] = [inner[v] for v in callee.returns]
            env.update(zip(op.results, given, strict=False))
        else:
            names: list[object] = [object() for _ in op.results]
            env.update(zip(op.results, names, strict=True))
            yield Instance(op, {v: env[v] for v in _used(op)}, names)


class Machine(Evaluator):
    """One rank. `memory` holds values by name; what has been written over is gone."""

    def __init__(self, module: Module, rank: int, peers: Any) -> None:
        super().__init__(module, WeightPrograms(module, LOADER, rank), torch.float32, peers=peers)
        self.memory: dict[object, Any] = {}
        self._views: dict[object, Instance] = {}
        self._placed: dict[object, int] = {}
        self._held: dict[int, object] = {}

    def get(self, name: Any) -> Any:
        """A value; raises Stale when it is not there."""
        if isinstance(name, int):
            return name
        if isinstance(name, WeightRef):
            return self._operand(name, {})
        if name in self._views:
            view = self._views[name]
            made = self.evaluated(view.op, view.env)
            return made[view.results.index(name)]
        if name not in self.memory:
            raise Stale("not computed yet")
        if name in self._placed and self._held[self._placed[name]] is not name:
            raise Stale("its buffer is another's by now")
        return self.memory[name]

    def evaluated(self, op: Op, env: dict[Value, Any]) -> list[Any]:
        """The results of one op."""
        inputs = [self._operand(o, {v: self.get(n) for v, n in env.items()}) for o in op.operands]
        return [self._store(v, r.type) for v, r in zip(self._run(op, inputs), op.results, strict=True)]

    def run_streams(self, instances: Sequence[Instance], draw: random.Random) -> None:
        """Ops in a random order among those that streams and events allow."""
        queues: dict[str, list[int]] = {}
        target: dict[int, int] = {}
        last: dict[object, int] = {}
        for i, one in enumerate(instances):
            if is_view(one.op):
                self._views.update(dict.fromkeys(one.results, one))
                continue
            if one.op.name == "event.record":
                last[one.op.attrs["event"]] = i
            elif one.op.name == "event.wait":
                target[i] = last[one.op.attrs["event"]]
            queues.setdefault(one.stream, []).append(i)
        left = {i for queue in queues.values() for i in queue}
        while left:
            fence = queues[""][0] if queues.get("") else len(instances)
            heads = [q[0] for s, q in queues.items() if q and s and q[0] < fence and target.get(q[0], -1) not in left]
            if fence == min(left):
                heads.append(fence)
            if not heads:
                raise Stale("streams wait for each other")
            i = draw.choice(heads)
            queues[instances[i].stream].pop(0)
            left.remove(i)
            self._issue(instances[i])

    def _issue(self, one: Instance) -> None:
        if one.op.name in EVENTS:
            return
        made = self.evaluated(one.op, one.env)
        self.memory.update(zip(one.results, made, strict=True))
        placed = one.op.attrs.get("buffers", ())
        assert isinstance(placed, tuple)
        for name, buffer in zip(one.results, placed, strict=False):
            assert isinstance(buffer, int)
            if buffer >= 0:
                self._placed[name], self._held[buffer] = buffer, name


@dataclass
class Part:
    """A micro-batch of CPU ranks: values of the entry, of the layer that it is in, and what is under way."""

    env: dict[Value, Any]
    inner: dict[Value, Any] = field(default_factory=dict)
    layer: int = -1
    under_way: dict[int, list[Any]] = field(default_factory=dict)


class Turns:
    """Runs turns as ranks do: an exchange takes what it sends when it starts and brings results when it is waited for.

    A layer's values lie in the arena as the compiler plans it: who writes there writes over what was there.
    """

    def __init__(self, machine: Machine, base: Module, parts: list[dict[Value, Any]]) -> None:
        self.machine, self.base, self.entry = machine, base, base.functions["decode"]
        self.steps = Steps.of_entry(base, self.entry)
        self.parts = [Part(env) for env in parts]
        self.loops = {
            base.functions[str(op.attrs["func"])]: op
            for op in self.entry.ops
            if op.name == "repeat" and exchanges(base.functions[str(op.attrs["func"])])
        }
        self.of = {op: f for f in [self.entry, *self.loops] for op in f.ops}
        symbols = {**symbol_bounds(16, 16, 16, 4, 4), "U": 16, "D": 64, "G": 64}
        self.layouts = {f: plan_function(f, symbols, {}, loop_result(f), crossing(base, f)) for f in self.loops}

    def run(self, turns: Sequence[Turn]) -> list[list[Any]]:
        """The entry's results of each part."""
        for what, k, layer, step in turns:
            part, ops = self.parts[k], self.steps.ops[step]
            function = self.of[ops[0]]
            if layer != part.layer or (layer >= 0 and function.args[0] not in part.inner):
                self._enter(part, function, layer)
            env = part.env if layer < 0 else part.inner
            if what == "wait":
                self._keep(function, env, ops[0], part.under_way.pop(step))
                continue
            for op in ops:
                if op.name == "repeat":
                    self._repeat(op, env)
                    continue
                made = self._evaluated(function, op, env)
                if what == "start":
                    part.under_way[step] = made
                else:
                    self._keep(function, env, op, made)
        assert not any(part.under_way for part in self.parts)
        return [[self._value(part.env, self.entry, v) for v in self.entry.returns] for part in self.parts]

    def _enter(self, part: Part, function: Function, layer: int) -> None:
        """Into a layer, or out of the last one: state goes on, the workspace is another's."""
        assert not part.under_way, "an exchange of the layer before is under way"
        before = next((f for f in self.loops if f.args[0] in part.inner), None)
        state = [self._value(part.inner, before, v) for v in before.returns] if before is not None else []
        if before is not None and before is not function:
            part.env.update(zip(self.loops[before].results, state, strict=True))
        part.layer, part.inner = layer, {}
        if layer >= 0:
            given = [self._value(part.env, self.entry, o) if isinstance(o, Value) else self.machine.get(o)
                     for o in self.loops[function].operands]  # fmt: skip
            if before is function:
                given[: len(state)] = state
            part.inner = dict(zip(function.args, [layer, *given], strict=True))

    def _repeat(self, call: Op, env: dict[Value, Any]) -> None:
        callee = self.base.functions[str(call.attrs["func"])]
        given = [env[o] if isinstance(o, Value) else self.machine.get(o) for o in call.operands]
        for layer in range(int(str(call.attrs["first"])), int(str(call.attrs["last"])) + 1):
            given[: len(call.results)] = self.machine.call(callee, [layer, *given])
        env.update(zip(call.results, given, strict=False))

    def _value(self, env: dict[Value, Any], function: Function, value: Value) -> Any:
        if value in env:
            return env[value]
        made = function.producer().get(value)
        if made is None or made.name not in VIEWS:
            raise Stale(f"%{value.name} of @{function.name} is not there")
        return self._evaluated(function, made, env)[made.results.index(value)]

    def _evaluated(self, function: Function, op: Op, env: dict[Value, Any]) -> list[Any]:
        known = {v: self._value(env, function, v) for v in _used(op)}
        inputs = [self.machine._operand(o, known) for o in op.operands]
        made = self.machine._run(op, inputs)
        return [self.machine._store(v, r.type) for v, r in zip(made, op.results, strict=True)]

    def _keep(self, function: Function, env: dict[Value, Any], op: Op, made: list[Any]) -> None:
        if function in self.layouts:
            self._write_over(self.layouts[function], env, op)
        env.update(zip(op.results, made, strict=True))

    def _write_over(self, layout: Layout, env: dict[Value, Any], op: Op) -> None:
        for result in op.results:
            if result not in layout.places:
                continue
            base = layout.places[result].base
            for value in [v for v in env if v in layout.places]:
                other = layout.places[value].base
                if isinstance(base, Slot) and isinstance(other, Slot) and base is not other:
                    gone = base.offset < other.offset + other.size and other.offset < base.offset + base.size
                else:
                    gone = base is other and layout.places[value] == layout.places[result]
                if gone:
                    del env[value]


def logits_of(module: Module, way: Any) -> list[torch.Tensor]:
    """Results of some decode calls, all ranks of the mesh: `way(machine, function, args)` gives one call's."""

    def rank(number: int, peers: Any) -> list[torch.Tensor]:
        mesh, function = mesh_of(module), module.functions["decode"]
        machine = Machine(module, number, peers)
        inputs = Inputs(function, (mesh.index(number, "dp"), mesh.dp))
        inputs.caches = {name: cache.float() for name, cache in inputs.caches.items()}
        found = []
        for tokens in CHUNKS[:2]:
            found += way(machine, function, inputs.chunk(tokens))
        return [*found, *inputs.caches.values()]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [y for one in run_ranks(mesh_of(module), rank) for y in one]
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # machines and what they hold refer to each other


def in_order(module: Module) -> list[torch.Tensor]:
    """One op after the other, as the text stands."""
    return logits_of(module, lambda machine, function, args: machine.call(function, args))


def by_streams(module: Module, seed: int) -> list[torch.Tensor]:
    """Streams of a scheduled module, in an order that `seed` draws (the same on all ranks)."""

    def way(machine: Machine, function: Function, args: list[Any]) -> list[torch.Tensor]:
        names: list[Any] = [object() for _ in args]
        machine.memory.update(zip(names, args, strict=True))
        env = dict(zip(function.args, names, strict=True))
        machine.run_streams(list(issued(module, function, env)), random.Random(seed))
        return [machine.get(env[v]) for v in function.returns]

    return logits_of(module, way)


def by_turns(split: Module, base: Module, turns: Sequence[Turn], count: int) -> list[torch.Tensor]:
    """Turns of CPU ranks, read off a schedule of `split`, over the functions of `base`."""

    def way(machine: Machine, function: Function, args: list[Any]) -> list[torch.Tensor]:
        given = {a.name: x for a, x in zip(function.args, args, strict=True)}
        entry = base.functions["decode"]
        parts = [{a: given.get(f"{a.name}_{k}", given.get(a.name)) for a in entry.args} for k in range(count)]
        found = Turns(machine, base, parts).run(turns)
        return [one[i] for i in range(len(entry.returns)) for one in found]

    return logits_of(split, way)
