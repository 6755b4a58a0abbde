"""The integer image of a task graph that the solvers work on: durations in grid units, amounts in grid amounts.

Durations and amounts are exact when they are decimals of a common, modest precision (the usual case); otherwise
durations are rounded up, so that a grid schedule is never shorter than the real one needs, and `slack` says by how
much a bound on the grid may lie above the real one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from moec.passes.scheduling.graph import Mode, TaskGraph

_TIME_LIMIT = 2**36
_ROUNDED_TIME = 2**30
_AMOUNT_LIMIT = 2**24


@dataclass(frozen=True)
class GridMode:
    """A mode in grid units; `uses` holds (resource position, amount) for amounts and durations above zero."""

    duration: int
    uses: tuple[tuple[int, int], ...]
    source: int
    """Position of the mode in the task's own `modes`."""


@dataclass(frozen=True)
class Grid:
    """`modes[i]` of task i, `arcs` (i, j, distance) between tasks, `capacities[r]`; `unit_us` of one grid unit."""

    unit_us: float
    exact: bool
    modes: list[list[GridMode]]
    capacities: list[int]
    arcs: list[tuple[int, int, int]]

    @property
    def size(self) -> int:
        """Number of tasks."""
        return len(self.modes)

    @property
    def slack(self) -> int:
        """Grid units by which rounding may have lengthened a path through all tasks."""
        return 0 if self.exact else self.size

    def within(self) -> list[tuple[int, int]]:
        """The arcs inside one iteration."""
        return [(i, j) for i, j, distance in self.arcs if distance == 0]


def make_grid(graph: TaskGraph, refine: int = 1) -> Grid:
    """The grid of `graph`; `refine` divides the unit (an interval may be a fraction of the durations' unit)."""
    fractions = {m.us: Fraction(repr(m.us)) for task in graph.tasks for m in task.modes}
    total = sum((max(fractions[m.us] for m in task.modes) for task in graph.tasks), Fraction(0))
    unit, exact = _unit([f for f in fractions.values() if f], total)
    unit /= refine
    ticks = {us: math.ceil(value / unit) for us, value in fractions.items()}

    names = list(graph.resources)
    scales = [_amount_scale(graph, name) for name in names]
    position = {name: r for r, name in enumerate(names)}

    def grid_mode(mode: Mode, source: int) -> GridMode:
        held = [(position[name], round(use * scales[position[name]])) for name, use in mode.uses.items()]
        return GridMode(ticks[mode.us], tuple((r, use) for r, use in held if use > 0 and mode.us > 0), source)

    index = graph.index
    arcs = {(index[a], index[b], 0) for a, b in graph.edges}
    arcs |= {(index[a], index[b], distance) for a, b, distance in graph.repeat}
    return Grid(
        unit_us=float(unit),
        exact=exact,
        modes=[_useful([grid_mode(m, k) for k, m in enumerate(task.modes)]) for task in graph.tasks],
        capacities=[math.floor(graph.resources[name] * scales[r] + 0.5) for r, name in enumerate(names)],
        arcs=sorted(arcs),
    )


def _unit(durations: list[Fraction], total: Fraction) -> tuple[Fraction, bool]:
    """The largest unit that all durations are multiples of, or a fine one when that would be too fine."""
    if not durations:
        return Fraction(1), True
    denominator = math.lcm(*(d.denominator for d in durations))
    if total * denominator <= _TIME_LIMIT:
        return Fraction(math.gcd(*(int(d * denominator) for d in durations)), denominator), True
    return total / _ROUNDED_TIME, False


def _amount_scale(graph: TaskGraph, name: str) -> float:
    """Grid amounts in one unit of a resource: exact for decimals of modest precision."""
    amounts = [graph.resources[name], *(m.uses.get(name, 0) for task in graph.tasks for m in task.modes)]
    fractions = [Fraction(repr(float(amount))) for amount in amounts]
    denominator = math.lcm(*(f.denominator for f in fractions))
    common = math.gcd(*(int(f * denominator) for f in fractions)) or 1
    scale = Fraction(denominator, common)
    greatest = Fraction(repr(float(max(amounts))))
    if greatest * scale > _AMOUNT_LIMIT:
        scale = _AMOUNT_LIMIT / greatest
    return float(scale)


def _useful(modes: list[GridMode]) -> list[GridMode]:
    """The modes without those that another one dominates: no slower, and no resource held more."""
    kept: list[GridMode] = []
    for mode in sorted(modes, key=lambda m: (m.duration, sum(use for _, use in m.uses))):
        held = dict(mode.uses)
        if not any(all(use <= held.get(r, 0) for r, use in other.uses) for other in kept):
            kept.append(mode)
    return kept
