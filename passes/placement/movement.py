"""Least movement: of the placements that are equally good, the one that keeps most replicas where they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moec.passes.placement import errors
from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Ints, Problem


def moved_slots(placement: Placement, previous: Placement) -> int:
    """Replicas that a device must load which it did not hold before, over all layers."""
    kept = sum(
        int(_overlap(now, before, placement.experts).diagonal().sum())
        for now, before in zip(_by_device(placement), _by_device(previous), strict=True)
    )
    return placement.layers * placement.slots - kept


def keep_previous(
    problem: Problem, placement: Placement, previous: Placement, ceiling: Floats, *, movable_nodes: bool
) -> Placement:
    """Rename devices and reorder slots so that as few replicas as possible move from `previous`.

    A layer whose previous placement still stays under `ceiling` [layers] with the new loads is kept as it was.
    Devices are interchangeable inside their node, and whole nodes with each other; across nodes only when
    `movable_nodes` and no group is bound to a node. Raises `PreviousMismatch`.
    """
    _check_shape(placement, previous)
    mapping, shares = placement.physical_to_logical_map.copy(), placement.replica_shares.copy()
    still_good = previous.greatest_loads(problem.loads) <= ceiling
    if problem.bound_to_nodes:
        still_good &= _respects_groups(problem, previous)
    if not movable_nodes:
        still_good[:] = False
    if placement.has_even_shares and not previous.has_even_shares:
        still_good[:] = False
    across = movable_nodes and not problem.bound_to_nodes
    for layer, (now, before) in enumerate(zip(_by_device(placement), _by_device(previous), strict=True)):
        if still_good[layer]:
            mapping[layer], shares[layer] = previous.physical_to_logical_map[layer], previous.replica_shares[layer]
            continue
        overlap = _overlap(now, before, placement.experts)
        devices = _match(overlap) if across else _match_nodes(overlap, problem.nodes)
        slots = _match_slots(now[devices], before)
        order = (devices[:, None] * placement.slots_per_device + slots).ravel()
        mapping[layer], shares[layer] = mapping[layer, order], shares[layer, order]
    return replace(placement, physical_to_logical_map=mapping, replica_shares=shares)


def _check_shape(placement: Placement, previous: Placement) -> None:
    def described(p: Placement) -> str:
        return f"{p.layers} layers, {p.experts} experts, {p.devices} devices x {p.slots_per_device} slots"

    if described(previous) != described(placement):
        raise errors.PreviousMismatch(previous=described(previous), wanted=described(placement))


def _by_device(placement: Placement) -> Ints:
    return placement.physical_to_logical_map.reshape(placement.layers, placement.devices, -1)


def _respects_groups(problem: Problem, previous: Placement) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each layer, whether every group of experts lives on one node only."""
    by_node = previous.physical_to_logical_map.reshape(problem.layers, problem.nodes, -1)
    group = by_node // (problem.experts // problem.groups)
    nodes_of_group = np.stack([(group == g).any(axis=2).sum(axis=1) for g in range(problem.groups)], axis=1)
    return np.asarray((nodes_of_group == 1).all(axis=1))


def _overlap(now: Ints, before: Ints, experts: int) -> Ints:
    """int64[devices, devices]: replicas that device a of `now` has in common with device b of `before`."""

    def held(devices: Ints) -> Ints:
        counts = np.zeros((len(devices), experts), np.int64)
        np.add.at(counts, (np.arange(len(devices))[:, None], devices), 1)
        return counts

    ours, theirs = held(now), held(before)
    common = np.zeros((len(now), len(before)), np.int64)
    # The common multiset of two devices: one more for every copy that both hold.
    for copies in range(1, int(max(ours.max(), theirs.max())) + 1):
        # In float32 the product runs through BLAS; the counts are small and stay exact.
        common += ((ours >= copies).astype(np.float32) @ (theirs >= copies).astype(np.float32).T).astype(np.int64)
    return common


def _match(overlap: Ints) -> Ints:
    """`match[b]`: the device of the new placement that becomes device b, with the greatest total overlap."""
    # SciPy is loaded where it is needed: plans that move nothing start without it.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(overlap, maximize=True)
    match = np.empty(len(overlap), np.int64)
    match[columns] = rows
    return match


def _match_nodes(overlap: Ints, nodes: int) -> Ints:
    """As `_match`, with the devices of a node staying together."""
    size = len(overlap) // nodes
    blocks = overlap.reshape(nodes, size, nodes, size).transpose(0, 2, 1, 3)
    inner = np.array([[_match(blocks[a, b]) for b in range(nodes)] for a in range(nodes)])
    gain = np.array([[blocks[a, b][inner[a, b], np.arange(size)].sum() for b in range(nodes)] for a in range(nodes)])
    outer = _match(gain)
    return np.concatenate([outer[b] * size + inner[outer[b], b] for b in range(nodes)])


def _match_slots(now: Ints, before: Ints) -> Ints:
    """`slots[d, s]`: the slot of device d in `now` whose expert goes to slot s, equal experts staying in their slot."""
    order = np.empty_like(now)
    for device, (ours, theirs) in enumerate(zip(now, before, strict=True)):
        order[device] = _match((ours[:, None] == theirs[None, :]).astype(np.int64))
    return order
