"""Periodic schedules in which like parts take turns: each does what the one before does, a part of the interval later.

A loop over n parts with the same tasks (`attn.0`, `attn.1`, ...) is a loop over one of them with an n-th of the
interval and n times the distances. That problem is so much smaller that its optimum is often found and proven at once;
schedules that treat the parts differently can be shorter, so it bounds nothing for the whole graph.
"""

from __future__ import annotations

import re
from dataclasses import replace

from moec.passes.scheduling.bounds import interval_bounds_us
from moec.passes.scheduling.check import check
from moec.passes.scheduling.graph import TaskGraph
from moec.passes.scheduling.schedule import Schedule, makespan
from moec.passes.scheduling.solve import Solution, solve

_PART = re.compile(r"(.*)\.(\d+)(:.*)?\Z")


def by_turns(graph: TaskGraph, effort: float = 1.0) -> Solution | None:
    """The best schedule by turns, `optimal` where it meets the simple bounds of the whole graph.

    None when the graph is not made of two or more like parts, numbered by the last `.k` of the tasks' names.
    """
    count = _parts(graph)
    if count < 2 or not graph.cyclic:
        return None
    first = tuple(t for t in graph.tasks if _split(t.name)[1] == 0)
    one = TaskGraph(
        graph.resources,
        first,
        tuple(e for e in graph.edges if _split(e[0])[1] == 0),
        tuple((a, b, n * count) for a, b, n in graph.repeat if _split(a)[1] == 0),
        graph.communication,
    )
    found = solve(one, effort=effort)
    assert found.interval_us is not None
    turn = found.interval_us
    start = {_named(name, k): us + k * turn for name, us in found.schedule.start_us.items() for k in range(count)}
    mode = {_named(name, k): m for name, m in found.schedule.mode.items() for k in range(count)}
    schedule = Schedule(start, mode, turn * count)
    check(graph, schedule)
    bounds = interval_bounds_us(graph)
    least = max(bounds.values())
    optimal = turn * count <= least * (1 + 1e-9)
    bound = turn * count if optimal else least
    length = makespan(graph, schedule)
    return Solution(schedule, length, found.lower_bound_us, optimal, bounds, turn * count, bound)


def better(one: Solution, other: Solution) -> Solution:
    """The shorter of two periodic schedules of one graph, with the better bound of both."""
    assert one.interval_us is not None and other.interval_us is not None
    best = one if one.interval_us < other.interval_us else other
    assert best.interval_us is not None
    bound = min(best.interval_us, max(one.interval_bound_us or 0.0, other.interval_bound_us or 0.0))
    proven = best.optimal or best.interval_us <= bound * (1 + 1e-9)
    return replace(best, interval_bound_us=bound, optimal=proven, bounds={**one.bounds, **other.bounds})


def _split(name: str) -> tuple[str, int]:
    """The name without its part, and the part; -1 without one."""
    match = _PART.match(name)
    return (match[1] + (match[3] or ""), int(match[2])) if match else (name, -1)


def _named(name: str, part: int) -> str:
    match = _PART.match(name)
    assert match is not None
    return f"{match[1]}.{part}{match[3] or ''}"


def _parts(graph: TaskGraph) -> int:
    """Number of like parts without edges between them; 0 when there are none."""
    parts: dict[int, dict[str, object]] = {}
    for task in graph.tasks:
        base, part = _split(task.name)
        parts.setdefault(part, {})[base] = task.modes
    count = len(parts)
    if set(parts) != set(range(count)) or any(parts[k] != parts[0] for k in parts):
        return 0
    edges: dict[int, set[tuple[str, str, int]]] = {k: set() for k in parts}
    for a, b, n in [*((a, b, 0) for a, b in graph.edges), *graph.repeat]:
        (source, part), (target, other) = _split(a), _split(b)
        if part != other:
            return 0
        edges[part].add((source, target, n))
    return count if all(edges[k] == edges[0] for k in edges) else 0
