"""The schedule of a layer: when its ops start, on which stream and with how many SMs, and what is proven of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.ir import Function, Op
from moec.ir.module import Attribute
from moec.passes.scheduling import Repeating, Solution, Task, TaskGraph, exposed_communication, solve
from moec.passes.scheduling.turns import better, by_turns
from moec.passes.streams.costs import Costs
from moec.passes.streams.rotate import Timing
from moec.passes.streams.tasks import COMPUTE, LINK, SEND, SMS, LayerTasks

STREAMS = {False: "compute", True: "comm"}
"""Streams of computation and of exchanges."""

EFFORT = 0.3
"""Work for a layer, as a factor on that of `solve`: about half a second where nothing is proven sooner.

Of the decode layers of three models on five clusters at two batches none got shorter with an effort of 1.
"""

ROUNDS, NEAR = 3, 0.01
"""Searches at most, and the gap to the bound (relative) at which no other one begins."""


@dataclass(frozen=True)
class LayerSchedule(Repeating):
    """A solved layer. Times in microseconds; `serial_us` is one op after the other with all SMs."""

    tasks: LayerTasks
    solution: Solution
    costs: Costs
    serial_us: float

    @property
    def communication_us(self) -> float:
        """Exchanges of a layer while the data are under way."""
        return sum(
            self.solution.schedule.mode_of(t).us for t in self.tasks.graph.tasks if self.tasks.graph.communicates(t)
        )

    @property
    def exposed_us(self) -> float:
        """Communication that no computation hides."""
        pieces = exposed_communication(self.tasks.graph, self.solution.schedule)
        return sum(end - start for start, end in pieces)

    @property
    def sms(self) -> int:
        """Most SMs that an exchange keeps."""
        graph, schedule = self.tasks.graph, self.solution.schedule
        return max((int(schedule.mode_of(t).share or 0) for t in graph.tasks if graph.communicates(t)), default=0)

    def order(self, resource: str = COMPUTE) -> list[str]:
        """Tasks on a resource by their place in the interval."""
        from moec.passes.scheduling import orders

        return orders(self.tasks.graph, self.solution.schedule)[resource]

    def timing(self) -> dict[Op, Timing]:
        """Start and placement of every op."""
        graph, schedule = self.tasks.graph, self.solution.schedule
        task = {t.name: t for t in graph.tasks}
        found: dict[Op, Timing] = {}
        for block in self.tasks.blocks.values():
            if block.exchange:
                found[block.ops[0]] = self._exchange(block.name, block.ops[0], task)
                continue
            mode = schedule.mode_of(task[block.name])
            sms = int(mode.share or self.costs.cores)
            alone = mode.share == self.costs.cores
            start = schedule.start_us[block.name]
            for op in block.ops:
                us = self.costs.whole[op].us if alone else self.costs.beside_us(op, sms)
                attrs: dict[str, Attribute] = {"stream": STREAMS[False]}
                if us:
                    attrs |= {"us": round(us, 3)} | ({"sms": int(mode.share)} if mode.share else {})
                found[op] = Timing(start, attrs)
                start += us
        return found

    def _exchange(self, name: str, op: Op, task: Mapping[str, Task]) -> Timing:
        schedule, time = self.solution.schedule, self.costs.whole[op]
        mode = schedule.mode_of(task[name])
        parts = {"send_us": time.send_us, "receive_us": time.receive_us}
        us = mode.us + sum(parts.values())
        attrs: dict[str, Attribute] = {"stream": STREAMS[True], "us": round(us, 3)}
        attrs |= {key: round(value, 3) for key, value in parts.items() if value}
        if mode.share:
            attrs["sms"] = int(mode.share)
        start = schedule.start_us[f"{name}:{SEND}" if time.send_us else name]
        return Timing(start, attrs)


def schedule_layer(function: Function, costs: Costs, tasks: LayerTasks, effort: float = EFFORT) -> LayerSchedule:
    """Schedule a layer function that repeats: the least interval found for its task graph, and the bound."""
    return LayerSchedule(tasks, least_interval(tasks.graph, effort), costs, costs.serial_us(function.ops))


@lru_cache(maxsize=64)
def least_interval(graph: TaskGraph, effort: float = EFFORT) -> Solution:
    """The best periodic schedule found; equal graphs are searched once.

    Micro-batches of one size are first scheduled by turns, each the same way as the one before (see `by_turns`), then
    with one division of the SMs throughout, both of which are small problems; the search over everything begins with
    the better of these, and anew with what it found while that is not near the bound.
    """
    best = by_turns(graph, effort)
    if best is not None and best.optimal:
        return best
    for other in _at_one_share(graph, effort):
        best = other if best is None else better(best, other)
    for seed in range(ROUNDS):
        found = solve(graph, effort=effort, seed=seed, start=None if best is None else best.schedule)
        best = found if best is None else better(best, found)
        if best.optimal or best.interval_us <= best.interval_bound_us * (1 + NEAR):  # type: ignore[operator]
            break
    assert best is not None
    return best


def _at_one_share(graph: TaskGraph, effort: float) -> Iterator[Solution]:
    """Schedules in which exchanges keep a number of SMs throughout and computation the rest, as is done by hand.

    Without a choice the search is quick and often exact; it bounds nothing for the graph with all choices.
    """
    cores = graph.resources.get(SMS, 0.0)
    for share in sorted({m.share for t in graph.tasks if graph.communicates(t) for m in t.modes if m.share}):
        kept: dict[str, list[int]] = {}
        for task in graph.tasks:
            wanted = share if graph.communicates(task) else cores - share
            fitting = [k for k, mode in enumerate(task.modes) if mode.share == wanted]
            kept[task.name] = fitting or list(range(len(task.modes)))
        tasks = tuple(replace(t, modes=tuple(t.modes[k] for k in kept[t.name])) for t in graph.tasks)
        found = solve(replace(graph, tasks=tasks), effort=effort)
        modes = {name: kept[name][k] for name, k in found.schedule.mode.items()}
        schedule = replace(found.schedule, mode=modes)
        yield replace(found, schedule=schedule, interval_bound_us=0.0, optimal=False)


__all__ = ["COMPUTE", "LINK", "LayerSchedule", "schedule_layer"]
