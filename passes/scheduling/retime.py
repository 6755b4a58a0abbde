"""Keep which task goes before which, and let everything start as early as it can.

Two tasks that share a resource and do not overlap keep their order; overlaps may only vanish. Since intervals of time
that pairwise overlap share a moment, no resource can then be held beyond what the given schedule held, whatever the
durations are. In a periodic schedule the same arcs, with distances in iterations, give the least interval of its
structure: the maximum cycle ratio. So a grid schedule becomes one in real time, and a loose one a tight one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain

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
    return adopt(grid, periodic.choice, periodic.starts, ends, periodic.interval)


def adopt(grid: Grid, choice: Sequence[int], starts: Sequence[int], ends: Sequence[int], period: int) -> Periodic:
    """As `compact`, for starts, ends and a period in any unit, which say only what goes before what."""
    modes = [modes[k] for modes, k in zip(grid.modes, choice, strict=True)]
    arcs: list[Arc] = [(i, j, modes[i].duration, distance) for i, j, distance in grid.arcs]
    for resource in range(len(grid.capacities)):
        users = [i for i, mode in enumerate(modes) if any(r == resource for r, _ in mode.uses)]
        arcs += [(i, j, modes[i].duration, lap) for i, j, lap in follows(users, starts, ends, period)]
    interval = math.ceil(maximum_cycle_ratio(grid.size, arcs))
    found = earliest_starts(grid.size, arcs, interval)
    return Periodic([round(start) for start in found], list(choice), interval)


def follows(
    users: Sequence[int], starts: Sequence[int], ends: Sequence[int], period: int
) -> list[tuple[int, int, int]]:
    """(i, j, lap): among the users of a resource, j of `lap` iterations later follows i with none in between.

    Period 0 is a schedule that runs once; laps are then 0. Users take longer than 0.
    """
    place = {j: starts[j] % period if period else starts[j] for j in users}
    order = sorted(users, key=place.__getitem__)
    places = [place[j] for j in order]
    found = []
    for i in users:
        since = ends[i]
        at = bisect_left(places, since % period if period else since)
        first_end: float = math.inf
        # Once around the circle; without one, to the end of the schedule.
        for j in chain(order[at:], order[:at] if period else ()):
            lap = -((starts[j] - since) // period) if period else 0
            start = starts[j] + lap * period
            if start >= first_end:
                break
            first_end = min(first_end, start + ends[j] - starts[j])
            found.append((i, j, lap))
    return found
