"""Runs a phase: its steps in order, layer by layer, launched one by one or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from moec.ir.expr import evaluate
from moec.runtime.cuda.arguments import Matrix
from moec.runtime.cuda.driver import Driver
from moec.runtime.cuda.errors import DamagedKernel
from moec.runtime.cuda.kernel import Kernel
from moec.runtime.cuda.memory import DeviceMemory
from moec.runtime.cuda.program import GpuEntry, Sizes

Action = Callable[[], None]


JOIN, FORK = "join", "fork"
Flat = tuple[Mapping[str, Any] | str, int]
"""A step and its layer; `JOIN` before a step that waits for all streams, `FORK` before those that wait for it."""


class Executor:
    """One phase on one device. Steps without a `stream` run on the main one, with no other stream beside them."""

    def __init__(self, driver: Driver, kernels: Mapping[str, Kernel], memory: DeviceMemory, entry: GpuEntry) -> None:
        self.driver, self.kernels, self.memory, self.entry = driver, kernels, memory, entry
        self.streams: dict[str, int] = {}
        self.events: dict[int, int] = {}
        self.main = driver.stream()
        self._graphs: dict[tuple[int, ...], int] = {}
        self._last = 0

    def run(self, sizes: Sizes, before: Action, after: Action) -> None:
        """Launch every step for these sizes between two actions on the main stream."""
        actions = list(self.actions(sizes))
        before()
        self._around(actions)
        after()

    def replay(self, sizes: Sizes, before: Action, after: Action) -> None:
        """The same through a graph, captured the first time that these sizes occur."""
        key = tuple(sizes.values())
        if key not in self._graphs:
            actions = list(self.actions(sizes))
            self.driver.begin_capture(self.main)
            before()
            self._around(actions)
            after()
            self._graphs[key] = self.driver.end_capture(self.main)
        self._last = self._graphs[key]
        self.again()

    def again(self) -> None:
        """Replay the graph that ran last."""
        self.driver.replay(self._last, self.main)

    def _around(self, actions: Sequence[Action]) -> None:
        """Actions on all streams, which start after what the main one has done and end before what it does next."""
        self._fork()
        for action in actions:
            action()
        self._join()

    @property
    def sides(self) -> list[int]:
        """Streams besides the main one."""
        return [s for s in self.streams.values() if s != self.main]

    def _fork(self) -> None:
        """Let all streams wait for what the main one has been given."""
        if sides := self.sides:
            start = self._event(-1)
            self.driver.record(start, self.main)
            for side in sides:
                self.driver.wait_for(side, start)

    def _join(self) -> None:
        """Let the main stream wait for what all have been given."""
        for number, side in enumerate(self.sides, start=2):
            end = self._event(-number)
            self.driver.record(end, side)
            self.driver.wait_for(self.main, end)

    @property
    def captured(self) -> int:
        """Graphs that exist."""
        return len(self._graphs)

    def actions(self, sizes: Sizes) -> Iterator[Action]:
        """What to do, one call after the other; parameters are packed as they are asked for."""
        for step, layer in self._flat():
            if isinstance(step, str):
                yield self._join if step == JOIN else self._fork
            else:
                yield self._action(step, sizes, max(layer, 0))

    def _flat(self) -> Iterator[Flat]:
        """The steps of all layers (-1: outside) in order, joins and forks between."""
        apart = True
        for step, layer in _every(self.entry.steps, -1):
            if ("stream" in step) is not apart:
                apart = not apart
                yield FORK if apart else JOIN, layer
            yield step, layer

    def _action(self, step: Mapping[str, Any], sizes: Sizes, layer: int) -> Action:
        stream = self._stream(step.get("stream"))
        if "kernel" in step:
            return partial(self.launch(step, sizes, layer), stream)
        if "fill" in step:
            at, size = self.memory.address(step["fill"], layer), evaluate(str(step["bytes"]), sizes)
            return partial(self.driver.zero, at, size, stream)
        if "copy" in step:
            to, source = (self.memory.address(r, layer) for r in step["copy"])
            return partial(self.driver.copy, to, source, evaluate(str(step["bytes"]), sizes), stream)
        if "record" in step:
            return partial(self.driver.record, self._event(step["record"]), stream)
        return partial(self.driver.wait_for, stream, self._event(step["wait"]))

    def launch(self, step: Mapping[str, Any], sizes: Sizes, layer: int) -> Callable[[int], None]:
        """A launch with its parameters packed, to be called with a stream. Raises DamagedKernel."""
        name = step["kernel"]
        if name not in self.kernels:
            raise DamagedKernel(name=name, reason="kernels.json does not list it")
        grid = tuple(evaluate(str(axis), sizes) for axis in step["grid"])
        arguments = {n: self._value(v, sizes, layer) for n, v in step["arguments"].items()}
        return self.kernels[name].bound(grid, arguments)

    def _value(self, value: Any, sizes: Sizes, layer: int) -> Any:
        if isinstance(value, Mapping):
            address = self.memory.address(value, layer)
            if "shape" not in value:
                return address
            return Matrix(address, tuple(evaluate(str(n), sizes) for n in value["shape"]), tuple(value["strides"]))
        return evaluate(value, sizes) if isinstance(value, str) else value

    def _stream(self, name: str | None) -> int:
        if name is None:
            return self.main
        if name not in self.streams:
            self.streams[name] = self.main if not self.streams else self.driver.stream()
        return self.streams[name]

    def _event(self, number: int) -> int:
        if number not in self.events:
            self.events[number] = self.driver.event()
        return self.events[number]


def _every(steps: Sequence[Mapping[str, Any]], layer: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    for step in steps:
        if "repeat" in step:
            first, last = step["repeat"]
            for number in range(first, last + 1):
                yield from _every(step["steps"], number)
        else:
            yield step, layer
