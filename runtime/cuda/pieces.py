"""A phase of one of several ranks: graphs of what lies between exchanges, events and launches of unknown size.

An exchange whose sizes only the ranks' counts tell cannot be part of a CUDA graph, and capturing it at its largest size
would send every token to every rank. So the steps are cut there: what runs on one stream without an exchange, an event
or a launch sized by an exchange is a piece, captured once for every batch size and layer. The host issues the pieces in
the order of the program; where an exchange has to wait for counts, it goes on with other streams until one of them
waits for what comes behind the exchange.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.executor import JOIN, Action, Executor
from moec.runtime.cuda.kernel import Kernel
from moec.runtime.cuda.memory import DeviceMemory
from moec.runtime.cuda.program import Exchange, GpuEntry, Sizes, parse_exchange
from moec.runtime.fields import Fields

LATE = re.compile(r"\bD\d*\b")


class Communicator(Protocol):
    """What runs exchanges: `runtime.distributed.device`, on a stream, watched by the monitor."""

    def begin(self, phase: str) -> None:
        """A call of a phase begins."""

    def start(self, op: Exchange, layer: int, sizes: dict[str, int], stream: int) -> Iterator[None]:
        """As `DeviceCollectives.start`."""


@dataclass
class Item:
    """Something that the host issues on a stream: actions (as a graph, when captured), an event, an exchange."""

    stream: int
    layer: int = -1
    actions: list[Action] = field(default_factory=list)
    graph: int = 0
    record: int | None = None
    wait: int | None = None
    exchange: Exchange | None = None
    late: Mapping[str, Any] | None = None
    fence: str = ""


@dataclass
class _Stopped:
    """A stream whose exchange waits for counts, and what comes behind it."""

    moves: Iterator[None]
    later: list[Item] = field(default_factory=list)


class PiecewiseExecutor(Executor):
    """Runs a phase piece by piece."""

    def __init__(
        self,
        driver: Driver,
        kernels: Mapping[str, Kernel],
        memory: DeviceMemory,
        entry: GpuEntry,
        communicator: Communicator,
    ) -> None:
        super().__init__(driver, kernels, memory, entry)
        self.communicator = communicator
        self._items: dict[tuple[int, ...], list[Item]] = {}
        self._stopped: dict[int, _Stopped] = {}
        self._coming: dict[int, int] = {}
        """Events that a stopped stream will record, and that stream."""

    @property
    def captured(self) -> int:
        return sum(bool(i.graph) for items in self._items.values() for i in items)

    def run(self, sizes: Sizes, before: Action, after: Action) -> None:
        self._go(list(self._cut(sizes)), sizes, before, after)

    def replay(self, sizes: Sizes, before: Action, after: Action) -> None:
        key = tuple(sizes.values())
        if key not in self._items:
            self._items[key] = list(self._cut(sizes))
            for item in self._items[key]:
                if len(item.actions) > 1:
                    self.driver.begin_capture(item.stream)
                    for action in item.actions:
                        action()
                    item.graph = self.driver.end_capture(item.stream)
        self._go(self._items[key], sizes, before, after)

    def _cut(self, sizes: Sizes) -> Iterator[Item]:
        piece: Item | None = None
        for step, layer in self._flat():
            if isinstance(step, str):
                if piece is not None:
                    yield piece
                piece = None
                yield Item(self.main, fence=step)
                continue
            stream = self._stream(step.get("stream"))
            if "collective" in step or "record" in step or "wait" in step or _late(step):
                if piece is not None:
                    yield piece
                piece = None
                if "collective" in step:
                    yield Item(stream, layer, exchange=parse_exchange(Fields(dict(step), "plan.json", "")))
                elif "record" in step:
                    yield Item(stream, record=self._event(step["record"]))
                elif "wait" in step:
                    yield Item(stream, wait=self._event(step["wait"]))
                else:
                    yield Item(stream, layer, late=step)
                continue
            if piece is not None and piece.stream != stream:
                yield piece
                piece = None
            piece = piece or Item(stream, layer)
            piece.actions.append(self._action(step, sizes, max(layer, 0)))
        if piece is not None:
            yield piece

    def _go(self, items: list[Item], sizes: Sizes, before: Action, after: Action) -> None:
        now = dict(sizes)
        self.communicator.begin(self.entry.name)
        before()
        self._fork()
        for item in items:
            self._issue(item, now)
        while self._stopped:
            self._finish(next(iter(self._stopped)), now)
        self._join()
        after()

    def _issue(self, item: Item, sizes: dict[str, int]) -> None:
        if item.fence:
            while self._stopped:
                self._finish(next(iter(self._stopped)), sizes)
            (self._join if item.fence == JOIN else self._fork)()
        elif item.stream in self._stopped:
            self._stopped[item.stream].later.append(item)
            if item.record is not None:
                self._coming[item.record] = item.stream
        elif item.graph:
            self.driver.replay(item.graph, item.stream)
        elif item.actions:
            for action in item.actions:
                action()
        elif item.record is not None:
            self.driver.record(item.record, item.stream)
        elif item.wait is not None:
            while item.wait in self._coming:
                self._finish(self._coming[item.wait], sizes)
            self.driver.wait_for(item.stream, item.wait)
        elif item.late is not None:
            self._action(item.late, sizes, max(item.layer, 0))()
        elif item.exchange is not None:
            moves = self.communicator.start(item.exchange, item.layer, sizes, item.stream)
            if next(moves, self) is not self:
                self._stopped[item.stream] = _Stopped(moves)
                if not self.sides:
                    self._finish(item.stream, sizes)

    def _finish(self, stream: int, sizes: dict[str, int]) -> None:
        """Wait for the counts of a stopped exchange, run it, and issue what has queued up behind it."""
        stopped = self._stopped.pop(stream)
        for _ in stopped.moves:
            raise AssertionError("an exchange stops once")
        for event in [e for e, s in self._coming.items() if s == stream]:
            del self._coming[event]
        for item in stopped.later:
            self._issue(item, sizes)


def _late(step: Mapping[str, Any]) -> bool:
    """Whether a step has sizes that an exchange brings."""
    values = [*step.get("grid", ()), step.get("bytes", ""), *step.get("arguments", {}).values()]
    return any(isinstance(v, str) and LATE.search(v) for v in values)
