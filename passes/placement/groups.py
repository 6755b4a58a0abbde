"""Groups of experts bound to nodes, as node-limited routing wants it: each node is then a problem of its own.

With G groups on N nodes every node hosts G / N whole groups, so that a token whose experts lie in few groups visits
few nodes (DeepSeek-V3 technical report, arXiv 2412.19437, sec. 2.1.2 and 3.2). Which groups share a node decides the
load of the fullest node, below which no packing inside the nodes can bring the greatest device load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement.bounds import lower_bound
from moec.passes.placement.counts import spread_widest
from moec.passes.placement.crowding import crowded_bound
from moec.passes.placement.heavy import settle
from moec.passes.placement.packing import Packing, improve, pack
from moec.passes.placement.problem import Floats, Ints, Problem

_MOST_PARTITIONS = 3000
_TRIED_PARTITIONS = 2

# Effort for each way to spread the groups: layers that need more than one way take more than one share.
_EFFORT_A_WAY = 0.2
# Effort for all sets of groups of the layers that are still further than this above their bound.
_EFFORT_OF_SETS = 0.6
_NEAR = 1 + 1e-3
# Sets of groups that get a closer look, of all layers together: 5 to 30 ms each.
_MOST_SETTLED = 48

# Places sub-problems: (loads [rows, experts], devices, slots, target [rows], effort) -> packing.
Solver = Callable[[Floats, int, int, Floats, float], Packing]


def node_bound(problem: Problem, *, even: bool = True) -> Floats:
    """Lower bound on the greatest device load of each layer when groups stay on one node; float64[layers].

    The least, over all ways to spread the groups over the nodes, of the fullest node's own lower bound. Where the
    ways are too many to list, the node of the heaviest group and what each group needs alone.
    """
    layers, groups = problem.layers, problem.groups
    grouped = problem.loads.reshape(layers, groups, -1)
    devices, slots = problem.devices // problem.nodes, problem.slots // problem.nodes
    whole = lower_bound(problem.loads, problem.devices, problem.slots, even=even)
    if _number_of_partitions(groups, problem.nodes) > _MOST_PARTITIONS:
        sums = np.sort(grouped.sum(axis=2), axis=1)
        lightest_mates = sums[:, : groups // problem.nodes - 1].sum(axis=1)
        fullest = np.maximum((sums[:, -1] + lightest_mates) / devices, _alone(problem, even=even).max(axis=1))
        return np.asarray(np.maximum(whole, fullest))
    # Nodes repeat between partitions: each set of groups is bounded once.
    sets, ways = _sets_and_ways(groups, problem.nodes)
    bounds = np.stack(
        [lower_bound(grouped[:, list(s)].reshape(layers, -1), devices, slots, even=even) for s in sets.tolist()], axis=1
    )
    return np.asarray(np.maximum(whole, bounds[:, ways].max(axis=2).min(axis=1)))


def _alone(problem: Problem, *, even: bool) -> Floats:
    """Lower bound on the greatest device load of the node that hosts a group: float64[layers, groups].

    The group shares its node with others, each of whose experts takes a slot.
    """
    size = problem.experts // problem.groups
    devices, slots = problem.devices // problem.nodes, problem.slots // problem.nodes
    left = slots - (problem.groups // problem.nodes - 1) * size
    bounds = lower_bound(problem.loads.reshape(-1, size), devices, left, even=even)
    return bounds.reshape(problem.layers, problem.groups)


def crowded_node_bound(problem: Problem, rows: Ints, bound: Floats, greatest: Floats) -> Floats:
    """`bound` of the layers `rows` with what heavy experts leave room for on a node; float64[rows], even shares.

    `greatest` is what a placement reaches: sets whose simple bounds are above it need no closer look.
    """
    groups, nodes = problem.groups, problem.nodes
    if _number_of_partitions(groups, nodes) > _MOST_PARTITIONS:
        return bound
    devices, slots = problem.devices // nodes, problem.slots // nodes
    sets, ways = _sets_and_ways(groups, nodes)
    loads = _loads_of_sets(problem, rows, sets)
    flat = loads.reshape(-1, loads.shape[2])
    values = lower_bound(flat, devices, slots).reshape(len(rows), -1)
    # A set far below the bound cannot decide it.
    close = (values > bound[:, None] / 2) & (values < greatest[:, None])
    values[close] = np.maximum(values[close], crowded_bound(loads[close], devices, slots))
    return np.asarray(np.maximum(bound, values[:, ways].max(axis=2).min(axis=1)))


def _sets_and_ways(groups: int, nodes: int) -> tuple[Ints, Ints]:
    """All sets of groups that could share a node [sets, groups per node], and all ways as such sets [ways, nodes]."""
    sets = np.array(list(combinations(range(groups), groups // nodes)))
    index = {tuple(members): i for i, members in enumerate(sets.tolist())}
    return sets, np.array([[index[node] for node in way] for way in _partitions(groups, nodes)])


def _experts_of_sets(problem: Problem, sets: Ints) -> Ints:
    """The experts of each set of groups: int64[sets, experts]."""
    size = problem.experts // problem.groups
    return np.asarray((sets[:, :, None] * size + np.arange(size)).reshape(len(sets), -1))


def _loads_of_sets(problem: Problem, rows: Ints, sets: Ints) -> Floats:
    """Loads of the experts of each set, in some layers: float64[rows, sets, experts]."""
    return problem.loads[rows[:, None, None], _experts_of_sets(problem, sets)[None]]


def place_groups(problem: Problem, bound: Floats, solve: Solver, *, even: bool) -> tuple[Packing, Floats]:
    """Place every layer with its groups bound to nodes; returns `bound` raised by what was proven on the way.

    Spreads the groups over the nodes (the most even way first, and the way of largest-first packing, which is what
    the greedy does) and solves every node as a problem of its own with the layer's `bound` as the target. For layers
    that stay above it, every set of groups that could share a node is solved: nodes do not meet, so the best of all
    ways to spread the groups follows from what each set needs. With even shares, sets that decide get a closer look.
    """
    shape = (problem.layers, problem.devices, problem.slots_per_device)
    best = Packing(np.zeros(shape, np.int64), np.full(shape, np.inf))
    greatest = np.full(problem.layers, np.inf)
    for homes, heaviest in _ways(problem):
        rows = np.flatnonzero((greatest > bound * _NEAR) & (heaviest < greatest))
        if not len(rows):
            continue
        packing = _solve_nodes(problem, rows, homes[rows], bound[rows], solve)
        now = packing.greatest
        better = np.flatnonzero(now < greatest[rows])
        best.replace(rows[better], packing.take(better))
        greatest[rows[better]] = now[better]
    rows = np.flatnonzero(greatest > bound * _NEAR)
    if len(rows) and _number_of_partitions(problem.groups, problem.nodes) <= _MOST_PARTITIONS:
        packing, proven = _best_sets(problem, rows, bound[rows], greatest[rows], solve, even=even)
        bound = bound.copy()
        bound[rows] = proven
        better = np.flatnonzero(packing.greatest < greatest[rows])
        best.replace(rows[better], packing.take(better))
    # The search stops a little above the bound; where the greedy is lucky, its placement counts.
    rows = np.arange(problem.layers)
    greedy = _solve_nodes(problem, rows, _largest_first(problem).experts, bound, _greedily)
    better = np.flatnonzero(greedy.greatest < best.greatest)
    best.replace(better, greedy.take(better))
    return best, bound


def _greedily(loads: Floats, devices: int, slots: int, target: Floats, effort: float) -> Packing:
    """A solver without a search: further replicas to the largest ones, largest first to the least loaded device."""
    return pack(loads, spread_widest(loads, slots), devices)


def _largest_first(problem: Problem) -> Packing:
    """Groups on nodes, the heaviest first on the lightest node with room: [layers, nodes, groups per node]."""
    sums = problem.loads.reshape(problem.layers, problem.groups, -1).sum(axis=2)
    return pack(sums, np.ones(sums.shape, np.int64), problem.nodes)


def _best_sets(
    problem: Problem, rows: Ints, bound: Floats, greatest: Floats, solve: Solver, *, even: bool
) -> tuple[Packing, Floats]:
    """The best of all ways to spread the groups of the layers `rows`, from solutions of all sets of groups.

    Sets that no way better than `greatest` can use, by their bounds, are left as they are: infinitely bad. Returns
    `bound` of these layers too, raised where more was proven.
    """
    layers, nodes, groups = len(rows), problem.nodes, problem.groups
    devices, slots = problem.devices // nodes, problem.slots // nodes
    sets, ways = _sets_and_ways(groups, nodes)
    experts, loads = _experts_of_sets(problem, sets), _loads_of_sets(problem, rows, sets)
    least = lower_bound(loads.reshape(layers * len(sets), -1), devices, slots, even=even).reshape(layers, -1)
    hopeful = least[:, ways].max(axis=2) < greatest[:, None]
    layer, which = np.nonzero(_used(hopeful, ways, len(sets)))
    at = np.full((layers, len(sets)), -1)
    at[layer, which] = np.arange(len(layer))
    solved = _Sets(loads, at, least, solve(loads[layer, which], devices, slots, bound[layer], _EFFORT_OF_SETS))
    if even and slots > devices:
        bound = solved.settle_those_that_decide(ways, bound, greatest)
    chosen = ways[solved.value[:, ways].max(axis=2).argmin(axis=1)]
    found = at[np.arange(layers)[:, None], chosen]
    # A layer without a hopeful way keeps what it has: infinitely bad here.
    sizes = np.where((found >= 0)[..., None, None], solved.packing.sizes[found], np.inf)
    flat = solved.packing.experts[found].reshape(layers * nodes, -1)
    named = np.take_along_axis(experts[chosen.ravel()], flat, axis=1)
    shape = (layers, problem.devices, problem.slots_per_device)
    return Packing(named.reshape(shape), sizes.reshape(shape)), bound


class _Sets:
    """Sets of groups of some layers, each a problem of one node: `loads` [layers, sets, experts].

    `packing` holds the solved ones, `at` [layers, sets] says where (-1: not solved); `value` [layers, sets] is what
    they reach, infinite where not solved, and `least` a lower bound on it.
    """

    def __init__(self, loads: Floats, at: Ints, least: Floats, packing: Packing) -> None:
        self.loads, self.at, self.least, self.packing = loads, at, least.copy(), packing
        self.value = (
            np.where(at >= 0, packing.greatest[at], np.inf) if len(packing.sizes) else np.full(at.shape, np.inf)
        )

    def settle_those_that_decide(self, ways: Ints, bound: Floats, greatest: Floats) -> Floats:
        """A closer look at sets (`heavy.settle`), the layers furthest from `bound` first; returns sharper bounds.

        In each layer the way with the least bound is followed, as long as some set of it is neither settled nor near
        that bound. `greatest` [layers] is what has been reached without these sets.
        """
        left = _MOST_SETTLED
        reached = np.minimum(greatest, self.value[:, ways].max(axis=2).min(axis=1))
        bound = bound.copy()
        for layer in np.argsort(-reached / np.maximum(bound, np.finfo(np.float64).tiny), kind="stable"):
            settled = np.zeros(self.value.shape[1], dtype=bool)
            while True:
                low = self.least[layer, ways].max(axis=1)
                way = int(low.argmin())
                bound[layer] = max(bound[layer], min(low[way], greatest[layer]))
                reached = min(greatest[layer], self.value[layer, ways].max(axis=1).min())
                among = ways[way][~settled[ways[way]] & (self.at[layer, ways[way]] >= 0)]
                if not left or reached <= bound[layer] * _NEAR or not len(among):
                    break
                decisive = int(among[self.value[layer, among].argmax()])
                if self.value[layer, decisive] <= bound[layer] * _NEAR:
                    break
                self._settle(int(layer), decisive, float(bound[layer]))
                settled[decisive] = True
                left -= 1
        return bound

    def _settle(self, layer: int, which: int, bound: float) -> None:
        """Settle one set; what it needs below `bound` does not matter."""
        row = self.at[layer, [which]]
        _, devices, per_device = self.packing.sizes.shape
        known = max(bound, float(self.least[layer, which]))
        loads, slots = self.loads[layer, which], devices * per_device
        packing, proven = settle(loads, devices, slots, self.packing.take(row), known)
        self.packing.replace(row, packing)
        self.value[layer, which] = packing.greatest[0]
        if proven > known:
            self.least[layer, which] = proven


def _used(hopeful: NDArray[np.bool_], ways: Ints, sets: int) -> NDArray[np.bool_]:
    """Which sets occur in the hopeful ways of each layer: [layers, sets]."""
    used = np.zeros((len(hopeful), sets), dtype=bool)
    layer, way = np.nonzero(hopeful)
    used[layer[:, None], ways[way]] = True
    return used


def _solve_nodes(problem: Problem, rows: Ints, homes: Ints, bound: Floats, solve: Solver) -> Packing:
    """Solve all nodes of the layers `rows`; `homes` int64[rows, nodes, groups per node] says who lives where."""
    nodes = problem.nodes
    size = problem.experts // problem.groups
    # int64[rows * nodes, experts per node]: the experts of each node, by their number in the layer.
    experts = (homes[..., None] * size + np.arange(size)).reshape(len(rows) * nodes, -1)
    layer = np.repeat(rows, nodes)
    packing = solve(
        problem.loads[layer[:, None], experts],
        problem.devices // nodes,
        problem.slots // nodes,
        np.repeat(bound, nodes),
        _EFFORT_A_WAY,
    )
    shape = (len(rows), problem.devices, problem.slots_per_device)
    flat = packing.experts.reshape(len(experts), -1)
    named = np.take_along_axis(experts, flat, axis=1).reshape(shape)
    return Packing(named, packing.sizes.reshape(shape))


def _ways(problem: Problem) -> Iterator[tuple[Ints, Floats]]:
    """Ways to spread groups over nodes: int64[layers, nodes, groups per node], and the mean device load of the fullest.

    The second value is a lower bound on what the way can lead to.
    """
    sums = problem.loads.reshape(problem.layers, problem.groups, -1).sum(axis=2)
    devices = problem.devices // problem.nodes
    layers = np.arange(problem.layers)[:, None, None]
    yield from (
        (homes, sums[layers, homes].sum(axis=2).max(axis=1) / devices)
        for homes in (*_most_even(problem, sums), _largest_first(problem).experts)
    )


def _most_even(problem: Problem, sums: Floats) -> Iterator[Ints]:
    """The ways with the lightest fullest node, best first."""
    groups, nodes = problem.groups, problem.nodes
    if _number_of_partitions(groups, nodes) > _MOST_PARTITIONS:
        packing = pack(sums, np.ones(sums.shape, np.int64), nodes)
        improve(packing, sums.sum(axis=1) / nodes, steps=10 * groups)
        yield packing.experts
        # Groups whose heavy experts need the spare slots of a node apart from each other.
        needed = _alone(problem, even=True)
        yield pack(needed, np.ones(needed.shape, np.int64), nodes).experts
        return
    ways = np.array(list(_partitions(groups, nodes)))
    fullest = sums[:, ways].sum(axis=3).max(axis=2)
    order = np.argsort(fullest, axis=1, kind="stable")
    for k in range(min(_TRIED_PARTITIONS, len(ways))):
        yield ways[order[:, k]]


def _number_of_partitions(groups: int, nodes: int) -> int:
    return factorial(groups) // int(factorial(groups // nodes) ** nodes * factorial(nodes))


def _partitions(groups: int, nodes: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to split `range(groups)` into `nodes` unordered sets of equal size."""

    def split(left: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not left:
            yield ()
            return
        for mates in combinations(left[1:], groups // nodes - 1):
            rest = tuple(g for g in left[1:] if g not in mates)
            for others in split(rest):
                yield ((left[0], *mates), *others)

    return split(tuple(range(groups)))
