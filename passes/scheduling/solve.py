"""Schedule a task graph: bounds, list schedule, local search and exact solver side by side, then real times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.passes.scheduling.bounds import (
    critical_path,
    interval_resource_bound,
    recurrence_bound,
    resource_bound,
    topological_order,
)
from moec.passes.scheduling.check import check
from moec.passes.scheduling.exact import beside, makespan_run
from moec.passes.scheduling.exact_cyclic import Periodic
from moec.passes.scheduling.graph import Mode, TaskGraph
from moec.passes.scheduling.grid import Grid, make_grid
from moec.passes.scheduling.interval import find_period
from moec.passes.scheduling.retime import retime
from moec.passes.scheduling.schedule import Schedule, makespan
from moec.passes.scheduling.search import Effort, Found, Given, LocalSearch

EFFORT = Effort(placements=700_000, exact=0.2)
"""Default effort for a graph that runs once: one to one and a half seconds on two cores."""

CYCLIC_EFFORT = Effort(placements=300_000, exact=0.4)
"""Default effort for a graph that repeats: one to two seconds on two cores."""

PATIENCE = 30.0
"""Seconds after which a search without a time limit ends although its work is not done."""

SOON, CYCLIC_SOON = 1.85, 3.7
"""The same where somebody waits for the answer to a graph that runs once, and to one that repeats."""

EXACT_TASKS = 200
"""Tasks beyond which the exact solver is not asked: it would not get past reading the model in the default time."""

_FIRST = 0.1
"""Share of the effort after which the exact solver joins: it starts from a good schedule, and often need not."""

_FINE = 1_000_000_000
"""Parts of an interval in which a given schedule is read."""

_PARTS = 1_000_000
"""Grid units of an interval that are fine enough not to be divided."""


@dataclass(frozen=True)
class Solution:
    """A checked schedule and what is proven of it; all times in microseconds.

    `bounds` holds the lower bounds that need no search: critical_path and resources of one iteration, and for a cyclic
    graph interval_resources and interval_recurrences. `lower_bound_us` and `interval_bound_us` are the best known,
    the exact solver's included. `optimal`: the makespan, of a cyclic graph the interval, is proven least, to the grid
    that `moec.passes.scheduling.grid` describes.
    """

    schedule: Schedule
    makespan_us: float
    lower_bound_us: float
    optimal: bool
    bounds: dict[str, float]
    interval_us: float | None = None
    interval_bound_us: float | None = None


class Repeating:
    """What holds of the solution of a graph that repeats; for schedules that carry one as `solution`."""

    solution: Solution

    @property
    def interval_us(self) -> float:
        """Time from layer to layer."""
        assert self.solution.interval_us is not None
        return self.solution.interval_us

    @property
    def bound_us(self) -> float:
        """The best lower bound on the interval of these tasks."""
        assert self.solution.interval_bound_us is not None
        return self.solution.interval_bound_us


def solve(
    graph: TaskGraph,
    time_limit: float | None = None,
    seed: int = 0,
    effort: float = 1.0,
    soon: bool = False,
    start: Schedule | None = None,
) -> Solution:
    """The best schedule found within `time_limit` seconds, on two threads at most.

    Without a time limit the search does a fixed amount of work, one to two seconds for an `effort` of 1:
    the same graph then gets the same schedule, unless the machine is so busy that thirty seconds do not suffice (with
    `soon` two, four for a graph that repeats). A graph that runs once gets the least makespan; one with `repeat` edges
    the least interval and, at that interval, a short iteration. `start` is a schedule to begin with: what is found is
    no longer. A proof ends the search early. The schedule has passed `check`; raises IllegalSchedule if `start` fails.
    """
    import ortools.sat.python.cp_model  # noqa: F401  the limit is for the search, not for loading the solver

    full = CYCLIC_EFFORT if graph.cyclic else EFFORT
    work = Effort(placements=full.placements * effort, exact=full.exact * effort)
    patience = (CYCLIC_SOON if graph.cyclic else SOON) if soon else PATIENCE
    spent = Effort.within(time_limit) if time_limit is not None else work.until(patience)
    if start is not None:
        check(graph, start)
    solution = (_solve_cyclic if graph.cyclic else _solve_once)(graph, spent, seed, start)
    check(graph, solution.schedule)
    return solution


def find_makespan(
    grid: Grid, bound: int, effort: Effort, seed: int = 0, given: Given | None = None
) -> tuple[Found, int]:
    """The shortest grid schedule found and the best bound: local search here, the exact solver on a second thread."""
    search = LocalSearch(grid, seed, given)
    if grid.size > EXACT_TASKS:
        return search.run(effort, lambda: bound), bound
    search.run(effort.share(_FIRST), lambda: bound)
    if search.best.length <= bound:
        return search.best, bound
    run = makespan_run(grid, search.best, bound)
    answer = beside(run, effort, lambda: search.run(effort, lambda: run.goal(bound)).length <= bound)
    return min(filter(None, (search.best, answer)), key=lambda found: found.length), run.bound(bound)


def _solve_once(graph: TaskGraph, effort: Effort, seed: int, start: Schedule | None) -> Solution:
    grid = make_grid(graph)
    simple = max(critical_path(grid), resource_bound(grid))
    found, proven = find_makespan(grid, simple, effort, seed, _given(graph, grid, start))
    _, schedule = _real(graph, grid, found.starts, found.choice)
    if start is not None and makespan(graph, start) < makespan(graph, schedule):  # by the rounding of the grid
        schedule = start
    length = makespan(graph, schedule)
    bound, optimal = _settle(length, proven, grid.slack, grid.unit_us)
    return Solution(schedule, length, bound, optimal, _bounds(grid))


def _solve_cyclic(graph: TaskGraph, effort: Effort, seed: int, start: Schedule | None) -> Solution:
    coarse = make_grid(graph)
    bounds = _bounds(coarse)
    ratios = interval_resource_bound(coarse), recurrence_bound(coarse)
    bounds["interval_resources"], bounds["interval_recurrences"] = (r * coarse.unit_us for r in ratios)
    least = max(ratios)
    if least == 0:  # nothing holds a resource and nothing waits for an earlier iteration
        grid, proven = coarse, 0
        found = Periodic([0] * grid.size, [0] * grid.size, 0)
    else:
        grid = make_grid(graph, refine=_refinement(coarse, least))
        low = math.ceil(least * coarse.unit_us / grid.unit_us * (1 - 1e-12))
        found, proven = find_period(grid, low, effort, seed, _given(graph, grid, start))
    interval, schedule = _real(graph, grid, found.starts, found.choice, found.interval)
    if start is not None and start.interval_us is not None and start.interval_us < interval:
        interval, schedule = start.interval_us, start
    length = makespan(graph, schedule)
    interval_bound, optimal = _settle(interval, proven, grid.slack + 1, grid.unit_us)
    return Solution(
        schedule=schedule,
        makespan_us=length,
        lower_bound_us=min(max(bounds["critical_path"], bounds["resources"]), length),
        optimal=optimal,
        bounds=bounds,
        interval_us=interval,
        interval_bound_us=max(interval_bound, min(interval, least * coarse.unit_us)),
    )


def _given(graph: TaskGraph, grid: Grid, start: Schedule | None) -> Given | None:
    """A schedule on the grid, with modes that hold no more than its own; None where it cannot be read so."""
    if start is None:
        return None
    rank = {i: r for r, i in enumerate(topological_order(grid.size, grid.within()))}
    order = sorted(range(grid.size), key=lambda i: (start.start_us[graph.tasks[i].name], rank[i]))
    choice = []
    for task, modes in zip(graph.tasks, grid.modes, strict=True):
        wanted = start.mode_of(task)
        fitting = [
            (task.modes[m.source].us, k) for k, m in enumerate(modes) if _holds_less(task.modes[m.source], wanted)
        ]
        if not fitting:
            return None
        choice.append(min(fitting)[1])
    # Fine enough to tell tasks apart that meet, and a little shorter, so that those that do not stay so.
    unit = (start.interval_us or makespan(graph, start) or 1.0) / _FINE
    starts = [round(start.start_us[task.name] / unit) for task in graph.tasks]
    shown = [max(round(start.mode_of(task).us / unit) - 20, 0) for task in graph.tasks]
    ends = [at + length for at, length in zip(starts, shown, strict=True)]
    return Given(order, choice, starts, ends, _FINE if graph.cyclic else 0)


def _holds_less(mode: Mode, other: Mode) -> bool:
    """Whether a mode fits where another one does, to the rounding of the grid, which keeps no mode that is worse."""
    return mode.us == 0 or all(use <= other.uses.get(r, 0) * (1 + 1e-6) for r, use in mode.uses.items())


def _real(
    graph: TaskGraph, grid: Grid, starts: list[int], choice: list[int], period: int = 0
) -> tuple[float, Schedule]:
    """The least interval and the schedule in microseconds that a grid schedule stands for."""
    picked = [modes[k] for modes, k in zip(grid.modes, choice, strict=True)]
    ends = [start + mode.duration for start, mode in zip(starts, picked, strict=True)]
    modes = [task.modes[mode.source] for task, mode in zip(graph.tasks, picked, strict=True)]
    interval, real = retime(graph, modes, starts, ends, period)
    names = [task.name for task in graph.tasks]
    chosen = {name: mode.source for name, mode in zip(names, picked, strict=True)}
    return interval, Schedule(dict(zip(names, real, strict=True)), chosen, interval if graph.cyclic else None)


def _refinement(grid: Grid, interval: float) -> int:
    """Parts of a grid unit that hold every least interval of a structure whose interval is at least so many units.

    Such an interval is a quotient: the durations along a cycle of tasks over the iterations that the cycle spans, which
    are then no more than all durations over the interval. From seven iterations on, sixtieths stand for the rest.
    """
    spanned = math.floor(sum(max(mode.duration for mode in modes) for modes in grid.modes) / interval)
    return 1 if interval >= _PARTS else math.lcm(*range(1, min(spanned, 6) + 1))


def _bounds(grid: Grid) -> dict[str, float]:
    units = {"critical_path": critical_path(grid), "resources": resource_bound(grid)}
    return {name: max(value - grid.slack, 0) * grid.unit_us for name, value in units.items()}


def _settle(value: float, proven: int, allowance: int, unit_us: float) -> tuple[float, bool]:
    """The bound in microseconds and whether `value` meets it; `allowance` units are what the grid may hide."""
    if value <= proven * unit_us * (1 + 1e-9):
        return value, True
    return max(proven - allowance, 0) * unit_us, False
