"""Placement that knows which experts are chosen together: keep them on one node, so that a token visits fewer nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moec.passes.placement.packing import Packing, improve, pack_replicas
from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Ints, Problem

_MOST_ROUNDS = 40
_SWAPS_A_ROUND = 24
_REPACK_SWAPS = 300


def together(placement: Placement, coactivation: Floats) -> Floats:
    """Co-activated pairs whose two experts are served on the same node; float64[layers].

    `coactivation` [layers, experts, experts] counts tokens that chose both experts (the diagonal is not looked at);
    every unordered pair counts once. A replica is taken to be chosen by its share, independently of the others.
    """
    return np.array([_within(*_affinity(placement, coactivation, layer)) for layer in range(placement.layers)])


def gather_partners(problem: Problem, placement: Placement, coactivation: Floats, ceiling: Floats) -> Placement:
    """Move experts between nodes so that more co-activated pairs share one; no device exceeds `ceiling` [layers].

    Per layer the best of two local searches: exchanging whole devices and then single replicas of nearly the same
    size; or exchanging replicas between nodes of nearly the same load and packing every node afresh. Groups bound to
    nodes leave no freedom, and the placement comes back as it was.
    """
    if problem.bound_to_nodes or problem.nodes == 1:
        return placement
    mapping, shares = placement.physical_to_logical_map.copy(), placement.replica_shares.copy()
    loads = placement.slot_loads(problem.loads)
    for layer in range(placement.layers):
        affinity, home = _affinity(placement, coactivation, layer)
        orders = [_exchange_devices_and_replicas(problem, affinity, home, loads[layer], ceiling[layer])]
        repacked = _exchange_and_repack(problem, affinity, home, loads[layer], ceiling[layer])
        if repacked is not None:
            orders.append(repacked)
        best = max(orders, key=lambda order: _within(affinity[np.ix_(order, order)], home))
        if _within(affinity[np.ix_(best, best)], home) > _within(affinity, home):
            mapping[layer], shares[layer] = mapping[layer, best], shares[layer, best]
    return replace(placement, physical_to_logical_map=mapping, replica_shares=shares)


def _affinity(placement: Placement, coactivation: Floats, layer: int) -> tuple[Floats, Ints]:
    """Co-activation between slots [slots, slots], and the node of each slot."""
    expert, share = placement.physical_to_logical_map[layer], placement.replica_shares[layer]
    affinity = coactivation[layer][np.ix_(expert, expert)] * share[:, None] * share[None, :]
    affinity = (affinity + affinity.T) / 2
    affinity[expert[:, None] == expert[None, :]] = 0.0
    return affinity, np.arange(placement.slots) // (placement.slots // placement.nodes)


def _within(affinity: Floats, home: Ints) -> float:
    return float(affinity[home[:, None] == home[None, :]].sum() / 2)


def _exchange_devices_and_replicas(
    problem: Problem, affinity: Floats, home: Ints, load: Floats, ceiling: float
) -> Ints:
    """An order of the slots: `order[i]` is the old slot whose replica now stands in slot i."""
    per_device = problem.slots_per_device
    by_device = affinity.reshape(problem.devices, per_device, problem.devices, per_device).sum(axis=(1, 3))
    device = np.arange(problem.devices)
    devices = _exchange(by_device, home[::per_device], np.zeros(problem.devices), device, np.inf)
    order = (devices[:, None] * per_device + np.arange(per_device)).ravel()
    return order[_exchange(affinity[np.ix_(order, order)], home, load[order], np.repeat(device, per_device), ceiling)]


def _exchange_and_repack(problem: Problem, affinity: Floats, home: Ints, load: Floats, ceiling: float) -> Ints | None:
    """As above with all slots of a node alike, then nodes packed afresh; None when that misses the ceiling."""
    devices, per_node = problem.devices // problem.nodes, problem.slots // problem.nodes
    fullest = load.reshape(problem.nodes, -1).sum(axis=1).max()
    # Half of the room above the mean is left to the packing inside the nodes.
    limit = max(fullest, devices * (ceiling + load.sum() / problem.devices) / 2)
    order = _exchange(affinity, home, load, home, limit).reshape(problem.nodes, per_node)
    size = load[order]
    falling = np.argsort(-size, axis=1, kind="stable")
    packing: Packing = pack_replicas(
        np.take_along_axis(order, falling, axis=1), np.take_along_axis(size, falling, axis=1), devices
    )
    improve(packing, np.full(problem.nodes, ceiling), _REPACK_SWAPS)
    return packing.experts.ravel() if packing.greatest.max() <= ceiling else None


def _exchange(affinity: Floats, home: Ints, load: Floats, bin_of: Ints, ceiling: float) -> Ints:
    """Swap items between homes while that raises the affinity inside homes; returns the item in each position.

    `home` and `bin_of` [positions] stay; items carry `load`, and no bin may carry more than `ceiling`. A round looks
    at all pairs at once and then makes its best swaps one after the other, each only if it still gains and fits.
    """
    order = np.arange(len(home))
    member = (home[:, None] == np.arange(home.max() + 1)[None, :]).astype(np.float64)
    carried = np.bincount(bin_of, weights=load)
    least = affinity.max() * 1e-9
    for _ in range(_MOST_ROUNDS):
        here, now = affinity[np.ix_(order, order)], load[order]
        pull = here @ member
        toward = pull[:, home]
        own = toward.diagonal()
        gain = toward + toward.T - own[:, None] - own[None, :] - 2 * here
        more, room = now[None, :] - now[:, None], ceiling - carried[bin_of]
        fits = (more <= room[:, None]) & (-more <= room[None, :])
        gain[(home[:, None] >= home[None, :]) | ~fits] = -np.inf
        count = min(_SWAPS_A_ROUND, gain.size - 1)
        candidates = np.argpartition(-gain, count, axis=None)[:count]
        candidates = candidates[np.argsort(-gain.flat[candidates], kind="stable")]
        swapped = False
        for a, b in zip(*np.unravel_index(candidates, gain.shape), strict=True):
            first, second = order[a], order[b]
            difference = affinity[first, order] - affinity[second, order]
            moving = difference @ (member[:, home[b]] - member[:, home[a]]) - 2 * affinity[first, second]
            change = load[second] - load[first]
            if moving > least and change <= ceiling - carried[bin_of[a]] and -change <= ceiling - carried[bin_of[b]]:
                order[a], order[b] = second, first
                carried[bin_of[a]] += change
                carried[bin_of[b]] -= change
                swapped = True
        if not swapped:
            break
    return order
