"""A schedule of a task graph, and what can be read off it: orders, utilisation, exposed communication."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moec.passes.scheduling.graph import Mode, Task, TaskGraph
from moec.passes.scheduling.pieces import Piece, covered, subtract


@dataclass(frozen=True)
class Schedule:
    """Start of each task in microseconds (of iteration 0) and the mode it runs in.

    `mode` holds positions in the task's `modes`; a task that is not listed runs in its first. With an interval,
    iteration i starts `i * interval_us` later; None: the graph runs once.
    """

    start_us: Mapping[str, float]
    mode: Mapping[str, int] = field(default_factory=dict)
    interval_us: float | None = None

    def mode_of(self, task: Task) -> Mode:
        """The mode that a task runs in."""
        return task.modes[self.mode.get(task.name, 0)]

    def end_us(self, task: Task) -> float:
        """End of a task of iteration 0, in microseconds."""
        return self.start_us[task.name] + self.mode_of(task).us


def makespan(graph: TaskGraph, schedule: Schedule) -> float:
    """Time from 0 to the end of the last task of iteration 0, in microseconds."""
    return max((schedule.end_us(task) for task in graph.tasks), default=0.0)


def orders(graph: TaskGraph, schedule: Schedule) -> dict[str, list[str]]:
    """For each resource the tasks that use it by start; in a cyclic schedule by their place in the interval."""
    interval = schedule.interval_us

    def place(task: Task) -> tuple[float, float]:
        start = schedule.start_us[task.name]
        return (phase(start, interval) if interval else start, schedule.end_us(task))

    return {
        resource: [
            task.name for task in sorted(graph.tasks, key=place) if schedule.mode_of(task).uses.get(resource, 0) > 0
        ]
        for resource in graph.resources
    }


def utilisation(graph: TaskGraph, schedule: Schedule) -> dict[str, float]:
    """Share of each resource held, over the makespan or, in a cyclic schedule, over the interval (0 to 1)."""
    span = makespan(graph, schedule) if schedule.interval_us is None else schedule.interval_us
    held = dict.fromkeys(graph.resources, 0.0)
    for task in graph.tasks:
        mode = schedule.mode_of(task)
        for resource, use in mode.uses.items():
            held[resource] += mode.us * use
    return {r: held[r] / (capacity * span) if capacity * span else 0.0 for r, capacity in graph.resources.items()}


def exposed_communication(graph: TaskGraph, schedule: Schedule) -> list[Piece]:
    """The pieces of time (start, end; microseconds) in which tasks on links run and no computation does.

    Computation is a task that holds a resource but no link: a send that spends a few SMs on driving its link is still
    communication. In a cyclic schedule the pieces lie in one interval of the steady state.
    """
    links = [task for task in graph.tasks if graph.communicates(task)]
    compute = [
        task
        for task in graph.tasks
        if not graph.communicates(task) and any(use > 0 for use in schedule.mode_of(task).uses.values())
    ]
    return subtract(_covered(links, schedule), _covered(compute, schedule))


def phase(start: float, interval: float) -> float:
    """Place of a start in the interval, 0 <= phase < interval; a rounding error below 0 counts as 0."""
    place = start % interval
    return 0.0 if interval - place <= 1e-9 * interval else place


def pieces(start: float, us: float, interval: float | None) -> list[Piece]:
    """The times that a task holds: itself, or its parts in one interval, [0, interval) as often as it covers it."""
    if interval is None:
        return [(start, start + us)]
    if interval <= 0:
        return []
    laps, rest = divmod(us, interval)
    begin = phase(start, interval)
    found = [(0.0, interval)] * math.floor(laps)
    if begin + rest > interval:
        return [*found, (begin, interval), (0.0, begin + rest - interval)]
    return [*found, (begin, begin + rest)]


def _covered(tasks: Iterable[Task], schedule: Schedule) -> list[Piece]:
    """The times in which any of the tasks runs."""
    return covered(
        piece
        for task in tasks
        for piece in pieces(schedule.start_us[task.name], schedule.mode_of(task).us, schedule.interval_us)
    )
