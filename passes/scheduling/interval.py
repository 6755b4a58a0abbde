"""The least initiation interval: list schedules wrapped around a circle, and the exact solver beside them.

A dependency that is on no cycle with a `repeat` edge never limits the interval, since the later task may run
any number of iterations behind. Such arcs are left out of the search and paid for in stages at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from moec.passes.scheduling.bounds import topological_order
from moec.passes.scheduling.exact import beside
from moec.passes.scheduling.exact_cyclic import Periodic, interval_run, span_run
from moec.passes.scheduling.grid import Grid
from moec.passes.scheduling.retime import adopt, compact
from moec.passes.scheduling.search import Effort, Given, LocalSearch

_FIRST, _SETTLED = 0.1, 0.8
"""Shares of the effort after which the exact solver joins, and after which the interval stays as it is."""

_SLICE, _ORDERS = 20_000, 40
"""Tasks, and orders of all tasks, that the local search places between two looks at what wrapping around the circle
makes of its best: the more of both."""

_PATIENCE = 3
"""Slices without a shorter iteration after which the local search starts anew."""


def find_period(
    grid: Grid, bound: int, effort: Effort, seed: int = 0, given: Given | None = None
) -> tuple[Periodic, int]:
    """The periodic grid schedule of the least interval found, and the best bound, from `bound` (above 0) up."""
    component = _components(grid)
    inner = replace(grid, arcs=[arc for arc in grid.arcs if component[arc[0]] == component[arc[1]]])
    settle = effort.share(_SETTLED)
    wrapped = Wrapped(inner, seed, given)
    best, proven = wrapped.run(settle.share(_FIRST), lambda: bound), bound
    if best.interval > bound:
        run = interval_run(inner, best, bound)
        if run is None:
            best = wrapped.run(settle, lambda: bound)
        else:
            answer = beside(run, settle, lambda: wrapped.run(settle, lambda: run.goal(bound)).interval <= bound)
            best = min(filter(None, (wrapped.best, answer)), key=lambda period: period.interval)
            proven = run.bound(bound)
    found = compact(grid, _staged(grid, component, best))
    shorten = span_run(grid, found)
    return (shorten and shorten.solve(effort.rest(_SETTLED))) or found, proven


class Wrapped:
    """Local search for short iterations, each wrapped around the circle; `best` has the least interval so far."""

    def __init__(self, grid: Grid, seed: int, given: Given | None = None) -> None:
        self._grid, self._seed = grid, seed
        self._search = LocalSearch(grid, seed, given)
        self._spent, self._idle = 0, 0
        self.best = self._wrap()
        if given is not None and given.period:
            other = adopt(grid, given.choice, given.starts, given.ends, given.period)
            self.best = min(self.best, other, key=lambda period: period.interval)

    def run(self, effort: Effort, goal: Callable[[], int]) -> Periodic:
        """Search until the interval is no longer than `goal()` or the effort is spent, counted from the start."""
        while self.best.interval > goal() and self._spent + self._search.placed < effort.placements:
            if time.monotonic() > effort.deadline:
                break
            self._improve(effort, goal)
        return self.best

    def _improve(self, effort: Effort, goal: Callable[[], int]) -> None:
        if self._idle == _PATIENCE or self._grid.size < 2:
            self._spent += self._search.placed
            self._seed, self._idle = self._seed + 1, 0
            self._search = LocalSearch(self._grid, self._seed)
        length = self._search.best.length
        slice_of = max(_SLICE, _ORDERS * self._grid.size)
        placements = min(self._search.placed + slice_of, effort.placements - self._spent)
        self._search.run(Effort(effort.deadline, placements), goal)
        self._idle = self._idle + 1 if self._search.best.length == length else 0
        self.best = min(self.best, self._wrap(), key=lambda period: period.interval)

    def _wrap(self) -> Periodic:
        """One iteration after the other, pushed together."""
        found = self._search.best
        return compact(self._grid, Periodic(found.starts, found.choice, found.length))


def _components(grid: Grid) -> list[int]:
    """The strongly connected component of each task under all arcs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    tails, heads = [i for i, _, _ in grid.arcs], [j for _, j, _ in grid.arcs]
    matrix = coo_array(([1] * len(tails), (tails, heads)), shape=(grid.size, grid.size))
    _, labels = connected_components(matrix, directed=True, connection="strong")
    return [int(label) for label in labels]


def _staged(grid: Grid, component: list[int], periodic: Periodic) -> Periodic:
    """Delay whole components by iterations until the arcs between them hold too; phases stay."""
    interval, starts = periodic.interval, periodic.starts
    between: dict[tuple[int, int], int] = {}
    for i, j, distance in grid.arcs:
        pair = component[i], component[j]
        if pair[0] != pair[1]:
            end = starts[i] + grid.modes[i][periodic.choice[i]].duration
            laps = math.ceil((end - starts[j]) / interval) - distance
            between[pair] = max(laps, between.get(pair, laps))
    count = max(component, default=-1) + 1
    delay = [0] * count
    after: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for (before, then), laps in between.items():
        after[before].append((then, laps))
    for before in topological_order(count, list(between)):
        for then, laps in after[before]:
            delay[then] = max(delay[then], delay[before] + laps)
    return replace(periodic, starts=[s + interval * delay[component[i]] for i, s in enumerate(starts)])
