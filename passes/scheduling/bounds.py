"""Lower bounds that need no search: critical path, resource energy with heads and tails, recurrences."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import permutations

from moec.passes.scheduling.cycles import maximum_cycle_ratio
from moec.passes.scheduling.graph import TaskGraph
from moec.passes.scheduling.grid import Grid, make_grid


def heads_and_tails(grid: Grid) -> tuple[list[int], list[int]]:
    """Earliest start of each task, and the least time from its end to the end of the iteration, on dependencies."""
    shortest = shortest_durations(grid)
    order = topological_order(grid.size, grid.within())
    heads, tails = [0] * grid.size, [0] * grid.size
    after: list[list[int]] = [[] for _ in range(grid.size)]
    for i, j in grid.within():
        after[i].append(j)
    for i in order:
        for j in after[i]:
            heads[j] = max(heads[j], heads[i] + shortest[i])
    for i in reversed(order):
        for j in after[i]:
            tails[i] = max(tails[i], shortest[j] + tails[j])
    return heads, tails


def critical_path(grid: Grid) -> int:
    """Length of the longest chain of dependencies, every task in its fastest mode."""
    heads, _ = heads_and_tails(grid)
    return max((head + d for head, d in zip(heads, shortest_durations(grid), strict=True)), default=0)


def resource_bound(grid: Grid) -> int:
    """The longest that any resource forces one iteration to take.

    For each resource and each pair of a head a and a tail b, the tasks that start no earlier than a and leave at
    least b after them hold it for their energy: a + energy / capacity + b (Carlier, 1982, for many machines).
    """
    heads, tails = heads_and_tails(grid)
    best = 0
    for resource, capacity in enumerate(grid.capacities):
        energy = [least_energy(grid, i, resource) for i in range(grid.size)]
        users = [i for i in range(grid.size) if energy[i]]
        by_tail = sorted(users, key=lambda i: -tails[i])
        for head in {heads[i] for i in users}:
            held = 0
            for i in by_tail:
                if heads[i] >= head:
                    held += energy[i]
                    best = max(best, head + -(-held // capacity) + tails[i])
    return best


def interval_resource_bound(grid: Grid) -> float:
    """The least interval that every resource's energy per iteration allows."""
    ratios = (
        sum(least_energy(grid, i, resource) for i in range(grid.size)) / capacity
        for resource, capacity in enumerate(grid.capacities)
        if capacity
    )
    return max(ratios, default=0.0)


def interval_bounds_us(graph: TaskGraph) -> dict[str, float]:
    """Bounds on the interval of a cyclic graph in microseconds, by what they come from; no search is needed."""
    grid = make_grid(graph)
    return {
        "interval_resources": interval_resource_bound(grid) * grid.unit_us,
        "interval_recurrences": recurrence_bound(grid) * grid.unit_us,
    }


def recurrence_bound(grid: Grid) -> float:
    """The largest ratio of time to distance over the cycles through `repeat` edges (Rau, 1994: RecMII)."""
    shortest = shortest_durations(grid)
    return maximum_cycle_ratio(grid.size, [(i, j, shortest[i], h) for i, j, h in grid.arcs])


def mode_cliques(grid: Grid) -> list[list[tuple[int, int]]]:
    """Sets of (task, mode) no two of which run side by side: their durations add up, whatever modes are chosen.

    They are tasks of two resources that take one at a time each, say computation and a link, where a third is divided
    between both: modes that hold more of it than some amount leaves, beside the others' modes that hold that amount or
    more. Energies alone would let a product run on all SMs for one half of the time and share them for the other.
    """
    count = len(grid.capacities)
    held = [[dict(mode.uses) for mode in modes] for modes in grid.modes]
    single = [
        [i for i, modes in enumerate(held) if all(mode.get(r, 0) * 2 > grid.capacities[r] for mode in modes)]
        for r in range(count)
    ]
    found: dict[frozenset[tuple[int, int]], None] = {}
    for one, other in permutations(range(count), 2):
        for shared in set(range(count)) - {one, other}:
            amounts = {mode.get(shared, 0) for i in single[other] for mode in held[i]} - {0}
            for amount in sorted(amounts):
                greedy = {
                    (i, k)
                    for i in single[one]
                    for k, mode in enumerate(held[i])
                    if mode.get(shared, 0) + amount > grid.capacities[shared]
                }
                beside = {(i, k) for i in single[other] for k, m in enumerate(held[i]) if m.get(shared, 0) >= amount}
                if greedy and beside:
                    found[frozenset(greedy | beside)] = None
    return [sorted(clique) for clique in found]


def shortest_durations(grid: Grid) -> list[int]:
    """Duration of each task in its fastest mode."""
    return [min(mode.duration for mode in modes) for modes in grid.modes]


def least_energy(grid: Grid, task: int, resource: int) -> int:
    """The least product of time and amount that a task holds of a resource."""
    return min(mode.duration * dict(mode.uses).get(resource, 0) for mode in grid.modes[task])


def topological_order(size: int, arcs: list[tuple[int, int]]) -> list[int]:
    """Positions 0..size-1 so that every arc points forward; `arcs` has no cycle."""
    order = TopologicalSorter[int]({i: () for i in range(size)})
    for i, j in arcs:
        order.add(j, i)
    return list(order.static_order())
