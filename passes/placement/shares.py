"""Unequal shares: the replicas of an expert may take different parts of its tokens.

A placement is a graph of devices and experts with an edge per slot. Within a connected component of d devices and
at most d * (n - 1) + 1 experts, n slots a device, every device can be filled to exactly the same load: with the
experts sorted by what is left of them, some window of n neighbours holds at least the wanted load while its n - 1
lightest hold at most that; they go to a device whole, and of the heaviest as much as still fits. The rest of it joins
the others, and the same holds again. (For two slots this is Walker's alias method.)

So with `slots - experts >= devices - 1` one component spans all devices and each carries the mean. With fewer slots
at least `devices - (slots - experts)` components are unavoidable, and the problem is to choose them with equal
load per device.
"""

from __future__ import annotations

import numpy as np

from moec.passes.placement.packing import Packing
from moec.passes.placement.problem import Floats, Ints

_SPARE = -1
_MOST_EXCHANGES = 400


def free_shares(loads: Floats, devices: int, slots: int, even: Packing | None) -> Packing:
    """Place `loads` [rows, experts] with free shares; `sizes` of the result are the loads that the slots carry.

    Where one component spans all devices, every device gets the mean and `even` is not looked at. Otherwise the
    components of the packing `even` (with even shares) are the start, and experts are exchanged between them; the
    greatest load never exceeds that of `even`.
    """
    rows, experts = loads.shape
    per_device = slots // devices
    result = Packing(np.empty((rows, devices, per_device), np.int64), np.zeros((rows, devices, per_device), np.float64))
    for row in range(rows):
        if even is None:
            parts = [(np.arange(devices), np.arange(experts))]
        else:
            parts = _balanced_components(loads[row], even.experts[row])
        for part_devices, part_experts in parts:
            filled = _fill(loads[row, part_experts], len(part_devices), per_device)
            chosen = np.where(filled.experts == _SPARE, _SPARE, part_experts[filled.experts])
            result.experts[row, part_devices] = chosen
            result.sizes[row, part_devices] = filled.sizes
    _use_spare_slots(loads, result)
    return result


def one_component(experts: int, devices: int, slots: int) -> bool:
    """Whether the slots allow every device to carry exactly the mean load."""
    return slots > devices and slots - experts >= devices - 1


def _fill(loads: Floats, devices: int, per_device: int) -> Packing:
    """Fill `devices` to exactly the same load; slots that nothing needs hold `_SPARE`. No row dimension."""
    wanted = loads.sum() / devices
    padding = devices * (per_device - 1) + 1 - len(loads)
    left = np.concatenate([np.zeros(padding), loads])
    name = np.concatenate([np.full(padding, _SPARE), np.arange(len(loads))])
    order = np.argsort(left, kind="stable")
    left, name = left[order], name[order]
    filled = Packing(np.empty((devices, per_device), np.int64), np.empty((devices, per_device), np.float64))
    for device in range(devices - 1):
        reach = np.concatenate([[0.0], left.cumsum()])
        windows = reach[per_device:] - reach[:-per_device]
        # Rounding may leave the last window a little short of the wanted load: it is then the right one all the same.
        start = min(int(np.searchsorted(windows, wanted)), len(windows) - 1)
        end = start + per_device - 1
        part = min(max(wanted - left[start:end].sum(), 0.0), left[end])
        filled.experts[device] = name[start : end + 1]
        filled.sizes[device, :-1] = left[start:end]
        filled.sizes[device, -1] = part
        rest, whose = left[end] - part, name[end]
        left, name = np.delete(left, np.s_[start : end + 1]), np.delete(name, np.s_[start : end + 1])
        at = int(np.searchsorted(left, rest))
        left, name = np.insert(left, at, rest), np.insert(name, at, whose)
    filled.experts[-1], filled.sizes[-1] = name, left
    return filled


def _use_spare_slots(loads: Floats, packing: Packing) -> None:
    """Put a replica without tokens into every spare slot: the heaviest expert that the device does not hold yet."""
    for row, device in np.argwhere((packing.experts == _SPARE).any(axis=2)):
        held = packing.experts[row, device]
        heaviest = np.argsort(-loads[row], kind="stable")
        others = heaviest[~np.isin(heaviest, held)]
        spare = np.flatnonzero(held == _SPARE)
        # A device with more slots than there are experts holds some of them twice.
        held[spare] = np.resize(others if len(others) else heaviest, len(spare))


def _balanced_components(loads: Floats, experts: Ints) -> list[tuple[Ints, Ints]]:
    """Devices and experts of each component after exchanges that lower the greatest load per device.

    `experts` int64[devices, slots per device] is the placement whose components are the start.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    devices, per_device = experts.shape
    edges = coo_matrix(
        (
            np.ones(experts.size, np.int8),
            (np.repeat(np.arange(devices), per_device), devices + experts.ravel()),
        ),
        shape=(devices + len(loads),) * 2,
    )
    count, label = connected_components(edges, directed=False)
    width = np.bincount(label[:devices], minlength=count)
    home = label[devices:]
    _exchange(loads, home, width)
    return [(np.flatnonzero(label[:devices] == c), np.flatnonzero(home == c)) for c in range(count)]


def _exchange(loads: Floats, home: Ints, width: Ints) -> None:
    """Swap experts between components, in place in `home`, always the swap that helps the fullest component most."""
    total = np.bincount(home, weights=loads, minlength=len(width))
    for _ in range(_MOST_EXCHANGES):
        fullest = int((total / width).argmax())
        top = total[fullest] / width[fullest]
        inside = np.flatnonzero(home == fullest)
        moved = loads[inside][:, None] - loads[None, :]
        ours = (total[fullest] - moved) / width[fullest]
        theirs = (total[home][None, :] + moved) / width[home][None, :]
        fuller = np.maximum(ours, theirs)
        fuller[:, home == fullest] = np.inf
        best = int(fuller.argmin())
        if fuller.flat[best] >= top * (1 - 1e-9):
            return
        a, b = inside[best // len(loads)], best % len(loads)
        change = loads[a] - loads[b]
        total[fullest] -= change
        total[home[b]] += change
        home[a], home[b] = home[b], home[a]
