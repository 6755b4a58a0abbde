"""Which ops of a function one kernel computes: chains of row-wise ops, and products with what follows them.

Read off the data flow. A row-wise op joins the kernels that make its operands where rows stay apart (one program a row
holds the whole row), or becomes the epilogue of the product that feeds it. Groups form an acyclic graph; their order is
that of the text as far as the graph allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moec.ir import Function, Op, TensorType, Value
from moec.ir.optable import OPS

VIEWS = ("split", "flatten", "unflatten")
EVENTS = ("event.record", "event.wait")
PRODUCTS = ("linear", "linear.heads", "moe.experts")
ROWS = (
    "norm.rms", "norm.layer", "norm.add_rms", "add", "scale", "clamp", "tensor.pointwise", "gate.rows", "swiglu",
    "quant.cast", "embed", "rows.gather", "moe.combine", "moe.weigh", "rope", "cache.append", "cache.append_heads",
    "cache.append_index",
)  # fmt: skip
READS_MEMORY = {
    "swiglu": (0,), "rope": (0,), "rows.gather": (0,), "moe.combine": (0, 1, 2), "moe.weigh": (0, 1, 2), "embed": (0,),
    "gate.rows": (1,),
}  # fmt: skip
"""Operands that a row-wise op reads piece by piece, so that the kernel which makes them must have ended."""
GROUP = 128
"""Columns that share a scale of a quantised activation."""


@dataclass(eq=False)
class Group:
    """Ops of one kernel, or of the few kernels that one op takes; `first`: where the earliest stands in the text."""

    ops: list[Op]
    first: int
    needs: set[Group] = field(default_factory=set)

    @property
    def anchor(self) -> Op:
        """The op that decides what kind of kernel this is."""
        return self.ops[0]

    @property
    def rowwise(self) -> bool:
        """Whether every op is row-wise."""
        return all(op.name in ROWS for op in self.ops)

    def outputs(self, function: Function) -> list[Value]:
        """Results that ops outside or the function's caller use, in order."""
        inside = set(self.ops)
        wanted = set(function.returns)
        for op in function.ops:
            if op not in inside:
                wanted.update(op.values())
        return [r for op in self.ops for r in op.results if r in wanted]


@dataclass
class _Graph:
    function: Function
    groups: list[Group] = field(default_factory=list)
    owner: dict[Op, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.producer = self.function.producer()
        self.uses = self.function.uses()

    def made_by(self, value: Value) -> Group | None:
        """The group whose kernel writes the memory of a value; views share the memory of what they look at."""
        op = self.producer.get(value)
        while op is not None and op.name in VIEWS:
            source = op.operands[0]
            assert isinstance(source, Value)
            op = self.producer.get(source)
        return self.owner.get(op) if op is not None else None

    def needs(self, op: Op) -> set[Group]:
        """Groups that must have run before `op`."""
        return {g for v in op.values() if (g := self.made_by(v)) is not None}

    def depends(self, later: Group, earlier: Iterable[Group]) -> bool:
        """Whether `later` comes after one of `earlier`, by any path."""
        targets, seen, pending = set(earlier), set(), [later]
        while pending:
            group = pending.pop()
            for need in group.needs:
                if need in targets:
                    return True
                if need not in seen:
                    seen.add(need)
                    pending.append(need)
        return False

    def joined(self, into: list[Group], op: Op, index: int, extra: set[Group]) -> None:
        """Put `op` and all of `into` into one group."""
        needs = (self.needs(op) | extra).union(*(g.needs for g in into)) - set(into)
        first = min([index, *(g.first for g in into)])
        ops = [o for g in sorted(into, key=lambda g: g.first) for o in g.ops]
        merged = Group([*ops, op], first, needs)
        for group in self.groups:
            if group.needs & set(into):
                group.needs = group.needs - set(into) | {merged}
        self.groups = [g for g in self.groups if g not in into] + [merged]
        self.owner.update(dict.fromkeys(merged.ops, merged))

    def acyclic(self, into: list[Group], op: Op, extra: set[Group]) -> bool:
        """Whether no group stands between the joined ones: it would have to run before and after them."""
        others = (self.needs(op) | extra).union(*(g.needs for g in into)) - set(into)
        return not any(self.depends(g, into) for g in others)


def groups_of(function: Function) -> list[Group]:
    """The groups of a function in the order in which they run; views, which no kernel computes, are left out."""
    graph = _Graph(function)
    fence: Group | None = None
    last_write: Group | None = None
    reads: list[Group] = []
    for index, op in enumerate(function.ops):
        if op.name in VIEWS:
            continue
        effect = OPS[op.name].effect
        # Reads and writes of the cache, and events between streams, keep their order.
        writes = {last_write} if last_write and effect else set()
        before: set[Group] = writes | set(reads) if effect == "write" else writes
        # What is issued before an event stays before it, and what comes after stays after.
        before |= set(graph.groups) if op.name in EVENTS else {fence} if fence else set()
        into = _candidates(graph, op, before)
        graph.joined(into, op, index, before)
        if effect == "write":
            last_write, reads = graph.owner[op], []
        elif effect == "read":
            reads.append(graph.owner[op])
        if op.name in EVENTS:
            fence = graph.owner[op]
        last_write = graph.owner[last_write.ops[0]] if last_write else None
        reads = [graph.owner[g.ops[0]] for g in reads]
    return _ordered(graph.groups)


def _candidates(graph: _Graph, op: Op, extra: set[Group]) -> list[Group]:
    """The groups that `op` joins."""
    if op.name not in ROWS:
        return []
    into: list[Group] = []
    for position, operand in enumerate(op.operands):
        made = graph.producer.get(operand) if isinstance(operand, Value) else None
        if made is None or made.name in VIEWS:
            continue
        if position in READS_MEMORY.get(op.name, ()) and not (made.name == "norm.rms" and turns_in_registers(op)):
            continue
        group = graph.owner[made]
        fits = group.rowwise and _rows(op) == _rows(made) and _stream(op) == _stream(made)
        if fits and group not in into and graph.acyclic([*into, group], op, extra):
            into.append(group)
    if into:
        return into
    for operand in op.operands:
        made = graph.producer.get(operand) if isinstance(operand, Value) else None
        if made is not None and made.name not in VIEWS and _is_epilogue(graph, graph.owner[made], made, op):
            group = graph.owner[made]
            if _stream(op) == _stream(made) and graph.acyclic([group], op, extra):
                return [group]
    return []


def _is_epilogue(graph: _Graph, group: Group, made: Op, op: Op) -> bool:
    """Whether `op` can be done on the tile of the product that `made` ends."""
    if group.anchor.name != "linear" or group.ops[-1] is not made:
        return False
    alone = len(graph.uses.get(made.results[0], [])) == 1 and made.results[0] not in graph.function.returns
    if op.name == "swiglu":
        return made.name == "linear" and alone
    if op.name == "add":
        return made.name in ("linear", "add") and alone
    return op.name == "quant.cast" and made.name == "swiglu" and op.attrs["granularity"] == f"1x{GROUP}"


def turns_in_registers(op: Op) -> bool:
    """Whether an op is a rotation of whole heads that can take its operand from registers: a power of two wide."""
    if op.name != "rope":
        return False
    shape = op.result.type.shape  # type: ignore[union-attr]
    dims = int(op.attrs["dims"])  # type: ignore[arg-type]
    return len(shape) == 3 and shape[2] == dims and op.attrs["offset"] == 0 and dims & (dims - 1) == 0


def _rows(op: Op) -> object:
    """The number of rows that a row-wise op works on."""
    value = op.results[0] if op.results else op.operands[2]
    assert isinstance(value.type, TensorType)
    return value.type.shape[0]


def _stream(op: Op) -> object:
    return op.attrs.get("stream")


def _ordered(groups: list[Group]) -> list[Group]:
    waiting = sorted(groups, key=lambda g: g.first)
    done: set[Group] = set()
    out = []
    while waiting:
        group = next(g for g in waiting if g.needs <= done)
        waiting.remove(group)
        done.add(group)
        out.append(group)
    return out
