"""Keep which task goes before which, and let everything start as early as it can.

Two tasks that share a resource and do not overlap keep their order; overlaps may only vanish. Since intervals of time
that pairwise overlap share a moment, no resource can then be held beyond what the given schedule held, whatever the
durations are. In a periodic schedule the same arcs, with distances in iterations, give the least interval of its
structure: the maximum cycle ratio. So a grid schedule becomes one in real time, and a loose one a tight one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moec.passes.scheduling.cycles import Arc, earliest_starts, maximum_cycle_ratio
from moec.passes.scheduling.exact_cyclic import Periodic
from moec.passes.scheduling.graph import Mode, TaskGraph
from moec.passes.scheduling.grid import Grid


def retime(
    graph: TaskGraph, modes: Sequence[Mode], starts: Sequence[int], ends: Sequence[int], period: int = 0
) -> tuple[float, list[float]]:
    """The least interval (0: the graph runs once) and the earliest starts, in microseconds, of a grid schedule."""
    index = graph.index
    arcs: list[Arc] = [(index[a], index[b], modes[index[a]].us, 0) for a, b in graph.edges]
    arcs += [(index[a], index[b], modes[index[a]].us, distance) for a, b, distance in graph.repeat]
    for resource in graph.resources:
        users = [i for i, mode in enumerate(modes) if mode.us > 0 and mode.uses.get(resource, 0) > 0]
        arcs += [(i, j, modes[i].us, lap) for i, j, lap in follows(users, starts, ends, period)]
    interval = maximum_cycle_ratio(len(modes), arcs) if period else 0.0
    return interval, earliest_starts(len(modes), arcs, interval)


def compact(grid: Grid, periodic: Periodic) -> Periodic:
    """The periodic grid schedule of the same structure with the least whole interval."""
    modes = [modes[k] for modes, k in zip(grid.modes, periodic.choice, strict=True)]
    ends = [start + mode.duration for start, mode in zip(periodic.starts, modes, strict=True)]
    arcs: list[Arc] = [(i, j, modes[i].duration, distance) for i, j, distance in grid.arcs]
    for resource in range(len(grid.capacities)):
        users = [i for i, mode in enumerate(modes) if any(r == resource for r, _ in mode.uses)]
        pairs = follows(users, periodic.starts, ends, periodic.interval)
        arcs += [(i, j, modes[i].duration, lap) for i, j, lap in pairs]
    interval = math.ceil(maximum_cycle_ratio(grid.size, arcs))
    starts = earliest_starts(grid.size, arcs, interval)
    return Periodic([round(start) for start in starts], periodic.choice, interval)


def follows(
    users: Sequence[int], starts: Sequence[int], ends: Sequence[int], period: int
) -> list[tuple[int, int, int]]:
    """(i, j, lap): among the users of a resource, j of `lap` iterations later follows i with none in between.

    Period 0 is a schedule that runs once; laps are then 0.
    """
    found = []
    for i in users:
        later = [
            (start, start + ends[j] - starts[j], j, lap)
            for j in users
            for start, lap in _runs(starts[j], ends[i], period)
        ]
        first_end = min((end for _, end, _, _ in later), default=0)
        found += [(i, j, lap) for start, _, j, lap in later if start < first_end]
    return found


def _runs(start: int, since: int, period: int) -> list[tuple[int, int]]:
    """(start, iteration) of a task's first run at or after `since` and of those before that one ends."""
    if not period:
        return [(start, 0)] if start >= since else []
    lap = -((start - since) // period)
    return [(start + lap * period, lap)]
