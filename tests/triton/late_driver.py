"""A stand-in whose streams work late: nothing is done before it is waited for, and then in a random order among those
that streams and events allow (a device may take any of them)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from standin import StandIn

Work = tuple[str, Callable[[], object] | object]
"""do: an action; record, wait: the mark that an event stands for."""


class LateStandIn(StandIn):
    """As `StandIn`; a graph is one action. `seed` draws the order."""

    def __init__(self, kernels: Path, seed: int) -> None:
        super().__init__(kernels)
        self.draw = random.Random(seed)
        self.queues: dict[int, list[Work]] = {}
        self.marks: dict[int, object] = {}
        self.over: set[object] = set()
        self.overtaken = 0
        """How often a stream went on while another one that had been given work before did not."""

    def do(self, stream: Any, action: Callable[[], object]) -> int:
        if not self.captures.note(stream.value, action):
            self._put(stream.value, "do", action)
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        self._put(stream.value, "do", lambda: super(LateStandIn, self).cuGraphLaunch(graph, stream))
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        if stream.value not in self.captures.clock:
            self.marks[event.value] = object()
            self._put(stream.value, "record", self.marks[event.value])
        return super().cuEventRecord(event, stream)

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        if stream.value not in self.captures.clock:
            self._put(stream.value, "wait", self.marks[event.value])
        return super().cuStreamWaitEvent(stream, event, flags)

    def cuStreamSynchronize(self, stream: Any) -> int:
        self.until(stream.value)
        return super().cuStreamSynchronize(stream)

    def _put(self, stream: int, kind: str, what: Callable[[], object] | object) -> None:
        self.queues.setdefault(stream, []).append((kind, what))

    def until(self, stream: int) -> None:
        """Work until a stream has nothing left."""
        while self.queues.get(stream):
            free = [s for s, q in self.queues.items() if q and not (q[0][0] == "wait" and q[0][1] not in self.over)]
            assert free, "streams wait for each other"
            chosen = self.draw.choice(free)
            self.overtaken += chosen != free[0]
            kind, what = self.queues[chosen].pop(0)
            if kind == "record":
                self.over.add(what)
            elif kind == "do":
                assert callable(what)
                what()
