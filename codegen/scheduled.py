"""A scheduled decode as CPU ranks run it: whose segment runs next, when an exchange starts and when it is waited for.

Segments are compiled once, from the phase as it was before it was scheduled, and run for every micro-batch in a
workspace of its own. Where they are cut and in which order they run is read off the scheduled text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from moec.ir import Function, IndexType, Module, Op, Value, WeightRef
from moec.ir.issue import Issued, Tracer
from moec.ir.module import Operand

EXCHANGES = ("comm.dispatch", "comm.combine")
VIEWS = ("split", "unflatten", "flatten")
CUTS = "segments"
"""Attribute of a function: positions of the ops that a segment starts with, besides those behind collectives."""

Turn = tuple[str, int, int, int]
"""What (run, start, wait), the micro-batch, the layer (-1 outside of layers), the step in the order of plan.json."""


def exchanges(function: Function) -> bool:
    """Whether a function has collectives."""
    return any(op.name.startswith("comm.") for op in function.ops)


def runs(module: Module, function: Function) -> Iterator[tuple[str, list[Op]]]:
    """The ops of a function as ranks run them: a `segment`, a `collective`, a `loop` over layers with collectives.

    A layer function ends with a segment, which leaves the result for the next layer; others of views alone are left.
    """
    given = function.attrs.get(CUTS, ())
    cuts = {int(str(at)) for at in given} if isinstance(given, tuple) else set()
    ops: list[Op] = []
    for position, op in enumerate(function.ops):
        single = "collective" if op.name.startswith("comm.") else ""
        if op.name == "repeat" and exchanges(module.functions[str(op.attrs["func"])]):
            single = "loop"
        if single or position in cuts:
            if any(o.name not in VIEWS for o in ops):
                yield "segment", ops
                ops = []
            elif single:
                ops = []
        if single:
            yield single, [op]
        else:
            ops.append(op)
    if any(o.name not in VIEWS for o in ops) or isinstance(function.args[0].type, IndexType):
        yield "segment", ops


@dataclass
class _Steps:
    """Steps of an entry by their number in plan.json: what each op belongs to."""

    of: dict[Op, int] = field(default_factory=dict)
    count: int = 0

    def add(self, module: Module, function: Function) -> None:
        for kind, ops in runs(module, function):
            if kind == "loop":
                self.add(module, module.functions[str(ops[0].attrs["func"])])
                continue
            self.of.update(dict.fromkeys(ops, self.count))
            self.count += 1


def crossing(module: Module, function: Function) -> set[Value]:
    """Values that another segment or a collective uses than the one that makes them."""
    group = {op: i for i, (_, ops) in enumerate(runs(module, function)) for op in ops}
    made = function.producer()
    return {v for op in function.ops for v in op.values() if v in made and group[made[v]] != group[op]}


def arrange(base: Module, scheduled: Module, name: str) -> list[Turn]:
    """Order and cut the functions of `base` as `scheduled` runs them, in place; returns the turns of entry `name`.

    `base` is the module before its batch was split.
    """
    issued = _Walk(base, scheduled, name)
    for function in issued.layers:
        issued.arrange(function)
    return issued.turns()


class _Walk:
    def __init__(self, base: Module, scheduled: Module, name: str) -> None:
        self.base, self.entry = base, base.functions[name]
        self.layers = [f for f in _called(base, self.entry) if exchanges(f)]
        self.order = list(Tracer(scheduled).run(scheduled.functions[name]))
        self.place: dict[int, tuple[Op, int, int]] = {}
        """By place in the order: the op of `base`, micro-batch and layer; ops of layers without exchanges are left."""
        self._match()

    def _match(self) -> None:
        known = {f.name: f for f in [self.entry, *self.layers]}
        waiting: dict[tuple[str, int, int], dict[object, list[Op]]] = {}
        layer_of: dict[Op | int, int] = {}
        for at, issued in enumerate(self.order):
            if issued.op.name.startswith(("event.", "index.")):
                continue
            function = known.get(_plain(issued.function.name))
            if function is None:
                continue
            part = int(str(issued.op.attrs.get("micro_batch", 0)))
            layer = -1
            if function is not self.entry:
                layer = _layer(issued, layer_of)
                layer_of[id(issued)] = layer
            key = function.name, part, layer
            if key not in waiting:
                waiting[key] = defaultdict(list)
                for op in function.ops:
                    waiting[key][_identity(op)].append(op)
            left = waiting[key][_identity(issued.op)]
            self.place[at] = left.pop(0), part, layer

    def _by_part(self, function: Function) -> dict[tuple[int, int], list[Op]]:
        found: dict[tuple[int, int], list[Op]] = defaultdict(list)
        ops = set(function.ops)
        for op, part, layer in self.place.values():
            if op in ops:
                found[part, layer].append(op)
        return found

    def arrange(self, function: Function) -> None:
        """Ops in the order of one micro-batch, and a cut wherever in any of them another op or a wait comes between.

        A segment runs where its first op stands: behind a wait for an exchange another one has to begin.
        """
        order = next(iter(self._by_part(function).values()))
        ours = set(function.ops)
        assert len(order) == len(ours), f"@{function.name}: {len(order)} of {len(ours)} ops are found in the schedule"
        beside: dict[tuple[int, int], set[tuple[Op, Op]]] = defaultdict(set)
        last: tuple[Op, int, int] | None = None
        for at, issued in enumerate(self.order):
            if issued.op.name == "event.wait":
                last = None
            if at not in self.place:
                continue
            op, part, layer = self.place[at]
            if op.name in VIEWS or op.name.startswith("comm."):
                continue
            if op in ours:
                beside[part, layer] |= {(last[0], op)} if last is not None and last[1:] == (part, layer) else set()
            last = op, part, layer
        always = set.intersection(*beside.values())
        shown = [op for op in order if op.name not in VIEWS]
        function.ops = order
        function.attrs[CUTS] = tuple(
            order.index(b) for a, b in pairwise(shown) if (a, b) not in always and not b.name.startswith("comm.")
        )

    def turns(self) -> list[Turn]:
        steps = _Steps()
        steps.add(self.base, self.entry)
        found: dict[Turn, None] = {}
        recorded: dict[object, list[Turn]] = {}
        started: dict[str, list[Turn]] = defaultdict(list)
        for at, issued in enumerate(self.order):
            if issued.op.name == "event.record" and issued.stream in started:
                # An event tells that all exchanges before it on its stream are over.
                recorded[issued.op.attrs["event"]] = list(started[issued.stream])
            elif issued.op.name == "event.wait" and issued.stream not in started:
                for _, part, layer, step in recorded.get(issued.op.attrs["event"], ()):
                    found.setdefault(("wait", part, layer, step))
            elif at in self.place:
                op, part, layer = self.place[at]
                if op not in steps.of:
                    continue
                turn = ("start" if op.name in EXCHANGES else "run", part, layer, steps.of[op])
                found.setdefault(turn)
                if op.name in EXCHANGES:
                    started[issued.stream].append(turn)
        return list(found)


def _called(module: Module, entry: Function) -> list[Function]:
    names = dict.fromkeys(str(op.attrs["func"]) for op in entry.ops if op.name == "repeat")
    return [module.functions[name] for name in names]


def _plain(name: str) -> str:
    return next((name.removesuffix(end) for end in (".fill", ".round", ".drain") if name.endswith(end)), name)


def _identity(op: Op) -> object:
    """What an op and its copies have in common."""
    place = str(op.loc).partition(",")[0].rstrip(")") if op.loc else ""
    return op.name, tuple(o.name for o in op.operands if isinstance(o, WeightRef)), len(op.results), place


def _layer(issued: Issued, known: dict[Op | int, int]) -> int:
    """The layer that an op works on: from its index, else that of what it uses."""
    assert issued.layer is not None
    shift = {o.results[0]: int(str(o.attrs["offset"])) for o in issued.function.ops if o.name == "index.affine"}
    index = issued.function.args[0]

    def indices(operand: Operand) -> list[object]:
        return list(operand.indices) if isinstance(operand, WeightRef) else [operand]

    for value in (v for operand in issued.op.operands for v in indices(operand)):
        if value is index:
            return issued.layer
        if value in shift:
            return issued.layer + shift[value]
    before = [known[id(s.writer)] for s in issued.reads if s.writer is not None and id(s.writer) in known]
    return max(before, default=issued.layer)
