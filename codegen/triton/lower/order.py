"""What has surely ended before what begins, in a function whose ops run on several streams between events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen.arena import Slot, at_once
from moec.codegen.triton.fused.groups import EVENTS, Group

CONTROL = ("repeat", "call", "index.affine", *EVENTS)
"""Ops that decide which steps run and when; no kernel computes them."""


@dataclass(eq=False)
class Buffer(Slot):
    """A buffer of the arena, and the first and last group that uses it on each stream."""

    uses: dict[object, tuple[int, int]] = field(default_factory=dict)

    def use(self, stream: object, at: int) -> None:
        """Note a use by group `at`."""
        first, last = self.uses.get(stream, (at, at))
        self.uses[stream] = min(first, at), max(last, at)
        self.first, self.last = min(self.first, at), max(self.last, at)


class Order:
    """Groups in the order of issue, each on its stream; a wait stands for all that its event's stream did before.

    Ops without a stream run on the first that is named, as at run time. Orders by way of a third stream are not seen:
    what is found is true, some that is true is not found.
    """

    def __init__(self, groups: Sequence[Group], loops: bool = False) -> None:
        """`loops`: the function runs for one layer after the other."""
        self.loops = loops
        named = [g.anchor.attrs["stream"] for g in groups if "stream" in g.anchor.attrs]
        self.main = named[0] if named else None
        self.streams = [g.anchor.attrs.get("stream", self.main) for g in groups]
        self.several = len({s for g, s in zip(groups, self.streams, strict=True) if g.anchor.name not in CONTROL}) > 1
        recorded = {g.anchor.attrs["event"]: i for i, g in enumerate(groups) if g.anchor.name == "event.record"}
        self._waits = [
            (recorded[g.anchor.attrs["event"]], at)
            for at, g in enumerate(groups)
            if g.anchor.name == "event.wait" and g.anchor.attrs["event"] in recorded
        ]

    def stream(self, at: int) -> object:
        """The stream of a group; behind the last one, the main one."""
        return self.streams[at] if at < len(self.streams) else self.main

    def before(self, a: object, last: int, b: object, first: int) -> bool:
        """Whether group `last` on stream a has ended before group `first` on stream b begins."""
        if a == b:
            return last < first
        return any(last <= record < wait <= first for record, wait in self._between(a, b))

    def before_next(self, a: object, last: int, b: object, first: int) -> bool:
        """The same for group `first` of the next turn of a loop around the function."""
        if a == b:
            return True
        # A wait behind its record counts in this turn and, if it comes in time, in the next; one before its record
        # waits for what the turn before recorded.
        return any(
            last <= record or wait <= first if record < wait else last <= record and wait <= first
            for record, wait in self._between(a, b)
        )

    def _between(self, a: object, b: object) -> list[tuple[int, int]]:
        return [(r, w) for r, w in self._waits if self.streams[r] == a and self.streams[w] == b]

    def meet(self, x: Slot, y: Slot) -> bool:
        """Whether two buffers may be in use at once, in this turn or from one to the next."""
        assert isinstance(x, Buffer) and isinstance(y, Buffer)
        if not self.several:
            return at_once(x, y)
        if not (self._ordered(x, y) or self._ordered(y, x)):
            return True
        return self.loops and not (self.turns(x, y) and self.turns(y, x))

    def _ordered(self, x: Buffer, y: Buffer) -> bool:
        return all(self.before(a, t, b, u) for a, (_, t) in x.uses.items() for b, (u, _) in y.uses.items())

    def turns(self, x: Buffer, y: Buffer) -> bool:
        """Whether all uses of x in a turn have ended before the next turn uses y."""
        return all(self.before_next(a, t, b, u) for a, (_, t) in x.uses.items() for b, (u, _) in y.uses.items())
