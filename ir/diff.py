"""Comparing modules by structure: functions by name, ops by what they compute, never by line or value name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from moec.ir.module import Function, Module, Op, Operand, Value, Weight
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
    name whose operands match, or that stand between the same matched ops, are changes; the others came or went.
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
        self.pairs: dict[int, int] = {}
        waiting: defaultdict[object, list[int]] = defaultdict(list)
        for j, op in enumerate(b.ops):
            waiting[_key(op, {})].append(j)
        for i, op in enumerate(a.ops):
            found = waiting.get(_key(op, self.values))
            if found:
                self._pair(i, found.pop(0))
        self.exact = dict(self.pairs)
        self._pair_changed()

    def _pair(self, i: int, j: int) -> None:
        self.pairs[i] = j
        self.values.update(zip(self.a.ops[i].results, self.b.ops[j].results, strict=False))

    def _pair_changed(self) -> None:
        """Pair ops of one name that are left over, in order of the gaps between exact pairs."""
        taken = set(self.pairs.values())
        free: defaultdict[str, list[int]] = defaultdict(list)
        for j, op in enumerate(self.b.ops):
            if j not in taken:
                free[op.name].append(j)
        for i, op in enumerate(self.a.ops):
            if i in self.pairs or not free[op.name]:
                continue
            names = _weight_names(op)
            best = next((j for j in free[op.name] if _weight_names(self.b.ops[j]) == names), None)
            best = free[op.name][0] if best is None else best
            free[op.name].remove(best)
            self._pair(i, best)

    def changes(self, where: str) -> list[Change]:
        out = []
        for i, op in enumerate(self.a.ops):
            j = self.pairs.get(i)
            if j is None:
                out.append(Change(where, "-", print_op(op, locations=False)))
            elif i not in self.exact:
                out += self._changed(where, op, self.b.ops[j])
        paired = set(self.pairs.values())
        out += [Change(where, "+", print_op(op, locations=False)) for j, op in enumerate(self.b.ops) if j not in paired]
        if _effects(self.a) != _effects(self.b) and not out:
            out.append(Change(where, "~", "order of the ops that use the cache"))
        if [self.values.get(v) for v in self.a.returns] != self.b.returns:
            before, after = (", ".join(f"%{v.name}" for v in f.returns) for f in (self.a, self.b))
            out.append(Change(where, "~", f"return {before} -> {after}"))
        return out

    def _changed(self, where: str, a: Op, b: Op) -> list[Change]:
        """An op whose attributes, types or own operands changed; one only fed by changed ops is not listed."""
        same_shape = a.attrs == b.attrs and [r.type for r in a.results] == [r.type for r in b.results]
        if same_shape and _key(a, self.values) == _key(b, {}):
            return []
        return [Change(where, "~", f"{print_op(a, locations=False)} -> {print_op(b, locations=False)}")]


def _key(op: Op, values: dict[Value, Value]) -> object:
    def operand(o: Operand) -> object:
        if isinstance(o, Value):
            return values.get(o, o)
        return o.name, tuple(values.get(i, i) for i in o.indices), str(o.type)

    attrs = tuple((k, repr(v)) for k, v in sorted(op.attrs.items()))
    return op.name, tuple(operand(o) for o in op.operands), attrs, tuple(str(r.type) for r in op.results)


def _weight_names(op: Op) -> tuple[str, ...]:
    return tuple(o.name for o in op.operands if not isinstance(o, Value))


def _effects(function: Function) -> list[str]:
    from moec.ir.optable import OPS

    return [op.name for op in function.ops if OPS[op.name].effect]
