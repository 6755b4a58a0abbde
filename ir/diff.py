"""Comparing modules by structure: functions by name, ops by what they compute, never by line or value name."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.module import Function, Module, Op, Value, Weight
from moec.ir.printer import print_attrs, print_op


@dataclass(frozen=True)
class Change:
    """One difference: where (`@function`, `weight @w` or `module`), `+`, `-` or `~`, and what."""

    where: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where}: {self.what}"


def diff(a: Module, b: Module) -> list[Change]:
    """What turns `a` into `b`, in order; empty when they are equal up to value names and locations.

    Ops match that have one name, attributes, result types and matching operands. Of the ops left over, those of one
    name that use the same weights or whose operands match are changes; the others came or went.
    """
    changes = [] if a.name == b.name else [Change("module", "~", f"name {a.name} -> {b.name}")]
    if a.attrs != b.attrs:
        changes.append(Change("module", "~", f"attributes{print_attrs(a.attrs)} ->{print_attrs(b.attrs)}"))
    for name in dict.fromkeys([*a.weights, *b.weights]):
        changes += _weight(f"weight @{name}", a.weights.get(name), b.weights.get(name))
    for name in dict.fromkeys([*a.functions, *b.functions]):
        changes += _function(f"@{name}", a.functions.get(name), b.functions.get(name))
    return changes


def _weight(where: str, a: Weight | None, b: Weight | None) -> list[Change]:
    if a is None or b is None:
        return _whole(where, a and a.type, b and b.type)
    changes = [] if a.type == b.type else [Change(where, "~", f"{a.type} -> {b.type}")]
    if a.indices != b.indices:
        changes.append(Change(where, "~", f"indices {a.indices} -> {b.indices}"))
    return changes + _function(where, a.program, b.program)


def _whole(where: str, a: object, b: object) -> list[Change]:
    return [Change(where, "+", f"new, {b}") if a is None else Change(where, "-", f"gone, was {a}")]


def _function(where: str, a: Function | None, b: Function | None) -> list[Change]:
    if a is None or b is None:
        return _whole(where, a and f"{len(a.ops)} ops", b and f"{len(b.ops)} ops")
    changes = []
    if [(v.name, v.type) for v in a.args] != [(v.name, v.type) for v in b.args]:
        changes.append(Change(where, "~", f"arguments {_args(a)} -> {_args(b)}"))
    if a.attrs != b.attrs:
        changes.append(Change(where, "~", f"attributes{print_attrs(a.attrs)} ->{print_attrs(b.attrs)}"))
    return changes + _Matching(a, b).changes(where)


def _args(function: Function) -> str:
    return "(" + ", ".join(f"%{v.name}: {v.type}" for v in function.args) + ")"


class _Matching:
    """Pairs of ops of two functions, found from the arguments down."""

    def __init__(self, a: Function, b: Function) -> None:
        self.a, self.b = a, b
        self.values: dict[Value, Value] = dict(zip(a.args, b.args, strict=False))
        self.taken = set(self.values.values())
        self.pairs: dict[int, int] = {}
        self.free = dict(enumerate(b.ops))
        for i, op in enumerate(a.ops):
            j = self._partner(op)
            if j is not None:
                self.pairs[i] = j
                made = self.free.pop(j).results
                self.values.update(zip(op.results, made, strict=False))
                self.taken.update(made)

    def _partner(self, op: Op) -> int | None:
        """The op of `b` that is most like one of `a`: equal, or of its name with its weights, or fed alike."""
        named = {j: o for j, o in self.free.items() if o.name == op.name}
        for degree in range(5):
            found = next((j for j, o in named.items() if self._alike(op, o, degree)), None)
            if found is not None:
                return found
        return None

    def _alike(self, op: Op, other: Op, degree: int) -> bool:
        """Whether two ops of one name are alike in a degree, 0 being equal."""
        match degree:
            case 0:
                return _own(other) == _own(op) and self._fed(op, other, strictly=True)
            case 1:
                return _own(other) == _own(op) and self._fed(op, other, strictly=False)
            case 2:
                return bool(_weight_names(op)) and _weight_names(other) == _weight_names(op)
            case 3:
                return not _weight_names(op) and self._fed(op, other, strictly=False)
        return _own(other) == _own(op) and {self.values.get(x) for x in op.values()} == set(other.values())

    def _fed(self, op: Op, other: Op, *, strictly: bool) -> bool:
        """Whether the operands match; unless `strictly`, values of ops that found no partner match one another."""
        mine, others = list(op.values()), list(other.values())
        if len(mine) != len(others):
            return False
        for x, y in zip(mine, others, strict=True):
            known = self.values.get(x)
            if known is not y and (strictly or known is not None or y in self.taken):
                return False
        return True

    def changes(self, where: str) -> list[Change]:
        out = []
        for i, op in enumerate(self.a.ops):
            j = self.pairs.get(i)
            if j is None:
                out.append(Change(where, "-", print_op(op, locations=False)))
                continue
            other = self.b.ops[j]
            if _own(op) != _own(other) or self._rewired(op, other):
                after = print_op(other, locations=False)
                out.append(Change(where, "~", f"{print_op(op, locations=False)} -> {after}"))
        out += [Change(where, "+", print_op(op, locations=False)) for op in self.free.values()]
        if not out and _effects(self.a) != _effects(self.b):
            out.append(Change(where, "~", "order of the ops that use the cache"))
        if [self.values.get(v) for v in self.a.returns] != self.b.returns:
            before, after = (", ".join(f"%{v.name}" for v in f.returns) for f in (self.a, self.b))
            out.append(Change(where, "~", f"return {before} -> {after}"))
        return out

    def _rewired(self, op: Op, other: Op) -> bool:
        """Whether an operand comes from another op; one from an op that came or went is told by that op."""
        pairs = zip(op.values(), other.values(), strict=False)
        return any(self.values.get(x, y) is not y or (x not in self.values and y in self.taken) for x, y in pairs)


def _own(op: Op) -> object:
    """What an op is apart from where its values come from."""
    weights = tuple((i, o.name, str(o.type)) for i, o in enumerate(op.operands) if not isinstance(o, Value))
    attrs = tuple((k, repr(v)) for k, v in sorted(op.attrs.items()))
    return op.name, len(op.operands), weights, attrs, tuple(str(r.type) for r in op.results)


def _weight_names(op: Op) -> tuple[str, ...]:
    return tuple(o.name for o in op.operands if not isinstance(o, Value))


def _effects(function: Function) -> list[str]:
    from moec.ir.optable import OPS

    return [op.name for op in function.ops if OPS[op.name].effect]
