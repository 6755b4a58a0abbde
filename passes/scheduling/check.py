"""Refuse illegal schedules, with the tasks and the reason; independent of the solvers and their grid."""

from __future__ import annotations

import math

from moec.passes.scheduling.errors import IllegalSchedule
from moec.passes.scheduling.graph import Task, TaskGraph
from moec.passes.scheduling.schedule import Schedule, makespan, pieces

_TIME = 1e-9
"""Overlaps up to this share of the makespan are rounding, not mistakes."""

_AMOUNT = 1e-6
"""Amounts may exceed a capacity by this share: decimals are not exact in floats."""


def check(graph: TaskGraph, schedule: Schedule) -> None:
    """Raise IllegalSchedule unless `schedule` keeps every dependency and capacity of `graph`.

    For a cyclic graph this covers all iterations: dependencies between them, and the resources that tasks of different
    iterations hold at the same time.
    """
    _check_complete(graph, schedule)
    tolerance = _TIME * max(makespan(graph, schedule), schedule.interval_us or 0.0)
    _check_dependencies(graph, schedule, tolerance)
    for resource in graph.resources:
        _check_capacity(graph, schedule, resource, tolerance)


def _check_complete(graph: TaskGraph, schedule: Schedule) -> None:
    for task in graph.tasks:
        start = schedule.start_us.get(task.name)
        if start is None:
            raise IllegalSchedule(reason=f"task {task.name!r} has no start", tasks=[task.name])
        if not (math.isfinite(start) and start >= 0):
            raise IllegalSchedule(reason=f"task {task.name!r} starts at {start:g} us", tasks=[task.name])
        mode = schedule.mode.get(task.name, 0)
        if not 0 <= mode < len(task.modes):
            raise IllegalSchedule(reason=f"task {task.name!r} has no mode {mode}", tasks=[task.name])
    unknown = [name for name in schedule.start_us if name not in graph.index]
    if unknown:
        raise IllegalSchedule(reason=f"{unknown[0]!r} is not a task of the graph", tasks=unknown)
    if graph.cyclic != (schedule.interval_us is not None):
        need = "needs an interval: it has repeat edges" if graph.cyclic else "runs once: an interval has no meaning"
        raise IllegalSchedule(reason=f"the graph {need}", tasks=[])
    if not math.isfinite(schedule.interval_us or 0.0) or (schedule.interval_us or 0.0) < 0:
        raise IllegalSchedule(reason=f"the interval is {schedule.interval_us:g} us", tasks=[])


def _check_dependencies(graph: TaskGraph, schedule: Schedule, tolerance: float) -> None:
    task = {item.name: item for item in graph.tasks}
    for before, after, distance in [*((a, b, 0) for a, b in graph.edges), *graph.repeat]:
        end = schedule.end_us(task[before])
        start = schedule.start_us[after] + distance * (schedule.interval_us or 0.0)
        if start < end - tolerance:
            later = f", {distance} iteration(s) later," if distance else ""
            reason = f"{after!r}{later} starts at {start:.10g} us before {before!r} ends at {end:.10g} us"
            raise IllegalSchedule(reason=reason, tasks=[before, after])


def _check_capacity(graph: TaskGraph, schedule: Schedule, resource: str, tolerance: float) -> None:
    """Walk over the starts and ends on one resource; ends come first where both fall together."""
    interval, events = schedule.interval_us, list[tuple[float, int, float, Task]]()
    for task in graph.tasks:
        mode = schedule.mode_of(task)
        use = mode.uses.get(resource, 0)
        if use <= 0 or mode.us <= 0:
            continue
        if interval is not None and interval <= tolerance < mode.us:
            reason = f"{task.name!r} holds {resource!r}, but infinitely many iterations start at once"
            raise IllegalSchedule(reason=reason, tasks=[task.name])
        for start, end in pieces(schedule.start_us[task.name], mode.us, interval):
            if end - start > 2 * tolerance:
                events += [(start + tolerance, 1, use, task), (end - tolerance, 0, use, task)]
    capacity, held, running = graph.resources[resource], 0.0, list[str]()
    for time, kind, use, task in sorted(events, key=lambda event: event[:2]):
        if not kind:
            running.remove(task.name)
            held = held - use if running else 0.0
            continue
        running.append(task.name)
        held += use
        if held > capacity * (1 + _AMOUNT):
            names = sorted(set(running))
            shared = " of different iterations" if interval is not None else ""
            reason = (
                f"{', '.join(map(repr, names))}{shared} hold {held:g} of {resource!r} together"
                f" at {time - tolerance:.10g} us, capacity {capacity:g}"
            )
            raise IllegalSchedule(reason=reason, tasks=names)
