"""The pass itself: from loads and the shape of the machine to a placement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.placement.bounds import lower_bound
from moec.passes.placement.crowding import crowded_bound
from moec.passes.placement.groups import crowded_node_bound, node_bound, place_groups
from moec.passes.placement.movement import keep_previous
from moec.passes.placement.packing import Packing
from moec.passes.placement.partners import gather_partners
from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Problem, Shares
from moec.passes.placement.search import search
from moec.passes.placement.shares import free_shares, one_component

DEFAULT_SLACK = 2e-3
# A layer this near to its bound needs no sharper one.
_NEAR = 1 + 7e-4


@dataclass(frozen=True)
class Result:
    """A placement with what was proven about it; all arrays are float64[layers].

    `greatest` is the load of the fullest device and `bound` a lower bound on it under the same constraints;
    `free_bound` is the bound without groups, so that `bound / free_bound` is the least that binding groups costs.
    """

    problem: Problem
    placement: Placement
    greatest: Floats
    bound: Floats
    free_bound: Floats

    @property
    def balance(self) -> Floats:
        """Greatest device load over the lower bound; 1 for a layer without load."""
        return _ratio(self.greatest, self.bound)

    @property
    def over_mean(self) -> Floats:
        """Greatest device load over the mean device load: how much longer the fullest device works than the average."""
        return _ratio(self.greatest, self.problem.loads.sum(axis=1) / self.problem.devices)

    @property
    def price_of_groups(self) -> Floats:
        """Lower bound with groups bound to nodes over the lower bound without."""
        return _ratio(self.bound, self.free_bound)


def _ratio(value: Floats, base: Floats) -> Floats:
    return np.where(base > 0, value / np.where(base > 0, base, 1.0), 1.0)


def place(
    problem: Problem,
    *,
    shares: Shares = "even",
    coactivation: Floats | None = None,
    previous: Placement | None = None,
    slack: float = DEFAULT_SLACK,
    seed: int = 0,
) -> Result:
    """Place the experts of every layer; the same input gives the same placement.

    Objectives in this order: the greatest device load; then, with `coactivation` float64[layers, experts, experts]
    (tokens that chose both experts), how many chosen experts of a token share a node; then, with `previous`, how few
    replicas move. The later two may raise the greatest load to the larger of what was found and `1 + slack` times the
    lower bound, and no further. Raises `PreviousMismatch` when `previous` is a placement of another shape.
    """
    # Without a choice between replicas on a device, or without replicas, even shares are the best ones.
    even = shares == "even" or problem.slots_per_device == 1 or problem.redundant == 0
    free_bound = lower_bound(problem.loads, problem.devices, problem.slots, even=even)
    bound = node_bound(problem, even=even) if problem.bound_to_nodes else free_bound

    def solve(loads: Floats, devices: int, slots: int, target: Floats, effort: float) -> Packing:
        if not even and one_component(loads.shape[1], devices, slots):
            return free_shares(loads, devices, slots, None)
        packing = search(loads, devices, slots, target, effort=effort, seed=seed)
        return packing if even or slots == devices else free_shares(loads, devices, slots, packing)

    if problem.bound_to_nodes:
        packing, bound = place_groups(problem, bound, solve, even=even)
    else:
        packing = solve(problem.loads, problem.devices, problem.slots, bound, 1.0)
    placement = Placement.of_packing(problem, packing, even=even)
    bound, free_bound = _sharpened(problem, bound, free_bound, placement.greatest_loads(problem.loads), even)
    ceiling = np.maximum(placement.greatest_loads(problem.loads), bound * (1 + slack))
    if coactivation is not None and problem.nodes > 1:
        placement = gather_partners(problem, placement, coactivation, ceiling)
    if previous is not None:
        placement = keep_previous(problem, placement, previous, ceiling, movable_nodes=coactivation is None)
    return Result(problem, placement, placement.greatest_loads(problem.loads), bound, free_bound)


def _sharpened(
    problem: Problem, bound: Floats, free_bound: Floats, greatest: Floats, even: bool
) -> tuple[Floats, Floats]:
    """Both bounds, with a closer look at the layers that a placement does not bring near to them."""
    if not even or problem.slots_per_device == 1:
        return bound, free_bound
    rows = np.flatnonzero(greatest > bound * _NEAR)
    if not len(rows):
        return bound, free_bound
    bound, free_bound = bound.copy(), free_bound.copy()
    crowded = crowded_bound(problem.loads[rows], problem.devices, problem.slots)
    free_bound[rows] = np.maximum(free_bound[rows], crowded)
    bound[rows] = np.maximum(bound[rows], crowded)
    if problem.bound_to_nodes:
        bound[rows] = crowded_node_bound(problem, rows, bound[rows], greatest[rows])
    return bound, free_bound
