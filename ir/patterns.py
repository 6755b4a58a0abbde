"""Patterns over the ops of a function: which op feeds which, by name; a match binds the ops that a pass wants.

SUM_AND_NORM = Pattern("norm.rms", (Pattern("add", bind="sum"),))
for norm, found in matches(function, SUM_AND_NORM):
    found["sum"].operands ...
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.module import Function, Op, Operand, Value, WeightRef


@dataclass(frozen=True)
class Pattern:
    """An op with one of `names` (bars between them) whose first operands fit `operands`.

    An operand is the pattern of the op that makes it, `WeightRef` for a weight, or None for anything. `bind` names the
    op in the match. With `alone` nothing but the op above uses any of its results, so that it may go.
    """

    names: str
    operands: tuple[Pattern | type[WeightRef] | None, ...] = ()
    bind: str = ""
    alone: bool = False


Match = dict[str, Op]
"""The ops that a pattern bound, by name."""


def matches(function: Function, pattern: Pattern) -> list[tuple[Op, Match]]:
    """Every op that fits, in order, with what was bound. Edits of the function may make later ones out of date."""
    finder = _Finder(function)
    found = ((op, finder.match(op, pattern)) for op in function.ops)
    return [(op, bound) for op, bound in found if bound is not None]


def match(function: Function, op: Op, pattern: Pattern) -> Match | None:
    """What the pattern binds at one op; None where it does not fit."""
    return _Finder(function).match(op, pattern)


class _Finder:
    def __init__(self, function: Function) -> None:
        self._made, self._uses, self._returned = function.producer(), function.uses(), set(function.returns)

    def match(self, op: Op, pattern: Pattern) -> Match | None:
        if op.name not in pattern.names.split("|") or len(op.operands) < len(pattern.operands):
            return None
        bound = {pattern.bind: op} if pattern.bind else {}
        for operand, wanted in zip(op.operands, pattern.operands, strict=False):
            inner = self._operand(operand, wanted, op)
            if inner is None:
                return None
            bound |= inner
        return bound

    def _operand(self, operand: Operand, wanted: Pattern | type[WeightRef] | None, user: Op) -> Match | None:
        if wanted is None:
            return {}
        if not isinstance(wanted, Pattern):
            return {} if isinstance(operand, WeightRef) else None
        made = self._made.get(operand) if isinstance(operand, Value) else None
        if made is None or (wanted.alone and not self._alone(made, user)):
            return None
        return self.match(made, wanted)

    def _alone(self, op: Op, user: Op) -> bool:
        users = [u for r in op.results for u in self._uses.get(r, [])]
        return all(u is user for u in users) and not self._returned.intersection(op.results)
