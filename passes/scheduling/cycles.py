"""Longest paths and the maximum cycle ratio of a graph with delays and iteration distances."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

Arc = tuple[int, int, float, int]
"""(i, j, delay, distance): start_j + distance * interval >= start_i + delay."""

_RELATIVE = 1e-12


def maximum_cycle_ratio(size: int, arcs: Sequence[Arc]) -> float:
    """The least interval for which start times exist: max over cycles of delay / distance, 0 without cycles.

    Newton's iteration on positive cycles (Dinkelbach; Burns, 1991): each step moves to the ratio of a real cycle,
    so the answer is a quotient of sums, without an error that grows. Cycles of distance 0 must have no delay.
    """
    interval = 0.0
    while True:
        cycle = positive_cycle(size, arcs, interval)
        if cycle is None:
            return interval
        ratio = sum(arc[2] for arc in cycle) / sum(arc[3] for arc in cycle)
        if ratio <= interval * (1 + _RELATIVE):
            return interval
        interval = ratio


def earliest_starts(size: int, arcs: Sequence[Arc], interval: float) -> list[float]:
    """The least non-negative start times that satisfy `arcs`; `interval` is at least the maximum cycle ratio."""
    starts, cycle = _relax(size, arcs, interval)
    if cycle is not None:
        raise ValueError(f"no start times exist at interval {interval}: {cycle}")
    return starts


def positive_cycle(size: int, arcs: Sequence[Arc], interval: float) -> list[Arc] | None:
    """A cycle whose delays exceed its distances times `interval`, or None."""
    return _relax(size, arcs, interval)[1]


def _relax(size: int, arcs: Sequence[Arc], interval: float) -> tuple[list[float], list[Arc] | None]:
    """Bellman-Ford with a queue from all nodes at 0, and a walk along parents that finds a positive cycle early."""
    out: list[list[tuple[int, float, Arc]]] = [[] for _ in range(size)]
    for arc in arcs:
        out[arc[0]].append((arc[1], arc[2] - arc[3] * interval, arc))
    scale = max((abs(arc[2]) + arc[3] * interval for arc in arcs), default=0.0)
    tolerance = scale * _RELATIVE
    starts = [0.0] * size
    parent: list[Arc | None] = [None] * size
    queue, queued, updates = deque(range(size)), [True] * size, 0
    while queue:
        i = queue.popleft()
        queued[i] = False
        for j, weight, arc in out[i]:
            if starts[i] + weight > starts[j] + tolerance:
                starts[j] = starts[i] + weight
                parent[j] = arc
                updates += 1
                if updates % size == 0 and (cycle := _parent_cycle(parent, j)):
                    return starts, cycle
                if not queued[j]:
                    queued[j] = True
                    queue.append(j)
    return starts, None


def _parent_cycle(parent: list[Arc | None], node: int) -> list[Arc] | None:
    """The cycle that the parents of `node` run into, if they do."""
    seen: dict[int, int] = {}
    walk: list[Arc] = []
    while node not in seen:
        seen[node] = len(walk)
        arc = parent[node]
        if arc is None:
            return None
        walk.append(arc)
        node = arc[0]
    return walk[seen[node] :]
