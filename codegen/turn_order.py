"""Proves that turns of CPU ranks keep the order of what they compute, from the values alone: not from how turns came.

What passes gives what one micro-batch after the other gives, bit for bit, however long exchanges last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from moec.codegen.scheduled import EXCHANGES, Steps, Turn
from moec.errors import MoecError
from moec.ir import Module


class UnorderedTurns(MoecError):
    """Turns that run something before what it needs: a bug of the compiler, and wrong results if they ran."""

    template: ClassVar[str] = "CPU ranks cannot follow the schedule of @{name}: {what} {why}"


def check_turns(base: Module, name: str, turns: Iterable[Turn], parts: int) -> None:
    """Raise UnorderedTurns unless each of `parts` micro-batches does every step of entry `name` once, in an order.

    A step comes after the steps whose results it uses, an exchange is started and then waited for. Layers of a
    micro-batch share a workspace: one is over before the next begins.
    """
    check = [_Part(Steps.of_entry(base, base.functions[name]), name, part) for part in range(parts)]
    for what, part, layer, step in turns:
        check[part].take(what, layer, step)
    for one in check:
        one.end()


class _Part:
    """Where a micro-batch is: the steps that are `left` of its stage, those under way, the stages to come."""

    def __init__(self, steps: Steps, name: str, part: int) -> None:
        self._steps, self._name, self._part = steps, name, part
        self._left: set[tuple[int, int]] = set()
        self._under_way: set[tuple[int, int]] = set()
        self._coming = [set(stage) for stage in steps.stages if stage]

    def take(self, what: str, layer: int, step: int) -> None:
        """One turn."""
        if not self._left and self._coming:
            self._left = self._coming.pop(0)
        key = layer, step
        exchange = any(op.name in EXCHANGES for op in self._steps.ops[step])
        if key not in self._left:
            self._refuse(layer, step, f"comes twice, or before {self._first()} is over")
        if (what == "run") is exchange or (what == "wait") is not (key in self._under_way):
            self._refuse(layer, step, f"cannot {what} here")
        if what != "wait":
            late = sorted(s for s in self._steps.needs[step] if (layer, s) in self._left)
            if late:
                self._refuse(layer, step, f"comes before {self._shown(layer, late[0])}, which it uses, is over")
        if what == "start":
            self._under_way.add(key)
        else:
            self._left.discard(key)
            self._under_way.discard(key)

    def end(self) -> None:
        """Nothing is left."""
        if not self._left and self._coming:
            self._left = self._coming.pop(0)
        if self._left:
            raise UnorderedTurns(name=self._name, what=self._first(), why="is never over")

    def _refuse(self, layer: int, step: int, why: str) -> None:
        raise UnorderedTurns(name=self._name, what=self._shown(layer, step), why=why)

    def _first(self) -> str:
        return self._shown(*min(self._left)) if self._left else "everything"

    def _shown(self, layer: int, step: int) -> str:
        ops = self._steps.ops[step]
        where = f"micro-batch {self._part}" + (f", layer {layer}" if layer >= 0 else "")
        return f"{ops[0].name if ops else 'a copy'} (step {step}, {where})"
