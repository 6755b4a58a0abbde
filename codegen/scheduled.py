"""A scheduled decode as CPU ranks run it: whose segment runs next, when an exchange starts and when it is waited for.

Segments are compiled once, from the phase as it was before it was scheduled, and run for every micro-batch in a
workspace of its own. Where they are cut and in which order they run is read off the scheduled text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from moec.codegen.issue_order import issue_order, looped
from moec.ir import Function, IndexType, Module, Op, Value

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
class Steps:
    """The steps of an entry by their number in plan.json: of each op, and the steps whose results each one uses.

    `ops` are those of each step, views left out, `stages` what a micro-batch ends before it begins the next: (layer,
    step) around loops and of each layer.
    """

    number: dict[Op, int] = field(default_factory=dict)
    ops: list[list[Op]] = field(default_factory=list)
    needs: list[set[int]] = field(default_factory=list)
    stages: list[list[tuple[int, int]]] = field(default_factory=lambda: [[]])

    @staticmethod
    def of_entry(module: Module, entry: Function) -> Steps:
        """The steps of an entry and of the layers that it loops over."""
        found = Steps()
        found._add(module, entry, [-1])
        return found

    def _add(self, module: Module, function: Function, layers: Sequence[int]) -> None:
        for kind, ops in runs(module, function):
            if kind == "loop":
                attrs = ops[0].attrs
                inner = range(int(str(attrs["first"])), int(str(attrs["last"])) + 1)
                self.stages += [[] for _ in inner]
                self._add(module, module.functions[str(attrs["func"])], inner)
                self.stages.append([])
                continue
            for stage, layer in zip(self.stages[-len(layers) :], layers, strict=True):
                stage.append((layer, len(self.ops)))
            self.number.update(dict.fromkeys(ops, len(self.ops)))
            self.ops.append([op for op in ops if op.name not in VIEWS])
        self.needs += [set() for _ in range(len(self.ops) - len(self.needs))]
        for op, used in sources(function).items():
            if op in self.number and op.name not in VIEWS:
                self.needs[self.number[op]] |= {self.number[s] for s in used if s in self.number} - {self.number[op]}


def crossing(module: Module, function: Function) -> set[Value]:
    """Values that another segment or a collective uses than the one that makes them."""
    group = {op: i for i, (_, ops) in enumerate(runs(module, function)) for op in ops}
    made = function.producer()
    # Views before a collective belong to no segment: their place is that of what they are views of.
    return {v for op in function.ops for v in op.values() if v in made and group.get(made[v]) != group.get(op)}


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
        self.layers = [f for f in looped(base, self.entry) if exchanges(f)]
        self.place = issue_order(base, scheduled, name, self.layers)

    def _by_part(self, function: Function) -> dict[tuple[int, int], list[Op]]:
        found: dict[tuple[int, int], list[Op]] = defaultdict(list)
        ops = set(function.ops)
        for op, part, layer in self.place:
            if op in ops:
                found[part, layer].append(op)
        return found

    def arrange(self, function: Function) -> None:
        """Ops in the order of one micro-batch, and a cut wherever in any of them another op comes between.

        A segment runs where its first op stands: an op that uses what other exchanges bring begins one.
        """
        order = next(iter(self._by_part(function).values()))
        numbers = [op for op in function.ops if op.name == "index.affine"]
        ours = set(function.ops) - set(numbers)
        assert len(order) == len(ours), f"@{function.name}: {len(order)} of {len(ours)} ops are found in the schedule"
        beside: dict[tuple[int, int], set[tuple[Op, Op]]] = defaultdict(set)
        last: tuple[Op, int, int] | None = None
        for op, part, layer in self.place:
            if op.name in VIEWS or op.name.startswith("comm."):
                continue
            if op in ours:
                beside[part, layer] |= {(last[0], op)} if last is not None and last[1:] == (part, layer) else set()
            last = op, part, layer
        always = set.intersection(*beside.values())
        function.ops = [*numbers, *order]
        brought = {op: {s for s in used if s.name.startswith("comm.")} for op, used in sources(function).items()}
        cuts: list[int] = []
        shown = [op for op in order if op.name not in VIEWS]
        first = shown[0]
        for a, b in pairwise(shown):
            if a.name.startswith("comm.") or b.name.startswith("comm."):
                first = b
            elif (a, b) not in always or not brought[b] <= brought[first]:
                cuts.append(function.ops.index(b))
                first = b
        function.attrs[CUTS] = tuple(cuts)

    def turns(self) -> list[Turn]:
        """Steps in the order of issue. An exchange is waited for where the first step comes that uses what it brings.

        That is where the schedule has waited for it at the latest, and holds whatever its events say.
        """
        steps = Steps.of_entry(self.base, self.entry)
        found: dict[Turn, None] = {}
        under_way: dict[tuple[int, int, int], None] = {}

        def wait(part: int, layer: int, step: int) -> None:
            if (part, layer, step) in under_way:
                del under_way[part, layer, step]
                found["wait", part, layer, step] = None

        for op, part, layer in self.place:
            if op not in steps.number or op.name in VIEWS:
                continue
            step = steps.number[op]
            turn = ("start" if op.name in EXCHANGES else "run", part, layer, step)
            if turn in found:
                continue
            for key in list(under_way):
                # The workspace of a micro-batch holds one layer at a time.
                if key[0] == part and (key[1] != layer or key[2] in steps.needs[step]):
                    wait(*key)
            found[turn] = None
            if turn[0] == "start":
                under_way[part, layer, step] = None
        for key in list(under_way):
            wait(*key)
        return list(found)


def sources(function: Function) -> dict[Op, set[Op]]:
    """The ops whose results each op uses, as they are or as views of them."""
    made = function.producer()
    found: dict[Op, set[Op]] = {}
    for op in function.ops:
        makers = [made[v] for v in op.values() if v in made]
        found[op] = {m for m in makers if m.name not in VIEWS}
        found[op] |= {s for m in makers if m.name in VIEWS for s in found[m]}
    return found
