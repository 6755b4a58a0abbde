"""Putting replicas of given sizes onto devices: largest first, pairs, and best swaps, in batches of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.passes.placement.problem import Floats, Ints

# The best swap is nearly always with one of the least loaded devices: all others are looked at only when none helps.
PARTNERS = 12
# A gain below rounding would let two swaps undo each other for ever.
_LEAST_GAIN = 1 - 1e-12


@dataclass
class Packing:
    """Which expert stands in which slot, and the load that its replica carries there.

    `experts` int64[rows, devices, slots per device], `sizes` float64 of the same shape.
    """

    experts: Ints
    sizes: Floats

    @property
    def greatest(self) -> Floats:
        """Greatest device load of each row."""
        return np.asarray(self.sizes.sum(axis=2).max(axis=1))

    def replace(self, rows: Ints, other: Packing) -> None:
        """Take over the rows of `other` as the rows `rows` of this packing."""
        self.experts[rows] = other.experts
        self.sizes[rows] = other.sizes

    def take(self, rows: Ints) -> Packing:
        return Packing(self.experts[rows], self.sizes[rows])


def replicas(loads: Floats, counts: Ints) -> tuple[Ints, Floats]:
    """Experts and sizes of all replicas under even shares, largest first: two arrays [rows, slots]."""
    rows, experts = loads.shape
    expert = np.repeat(np.tile(np.arange(experts), rows), counts.ravel()).reshape(rows, -1)
    size = np.take_along_axis(loads / counts, expert, axis=1)
    order = np.argsort(-size, axis=1, kind="stable")
    return np.take_along_axis(expert, order, axis=1), np.take_along_axis(size, order, axis=1)


def pack(loads: Floats, counts: Ints, devices: int) -> Packing:
    """Place `counts` [rows, experts] replicas with even shares; see `pack_replicas`."""
    return pack_replicas(*replicas(loads, counts), devices)


def pack_replicas(expert: Ints, size: Floats, devices: int) -> Packing:
    """Place replicas, largest first in each row: two arrays [rows, slots].

    Pairs of largest with smallest for two slots a device (optimal for these sizes), otherwise each to the least
    loaded device with a free slot.
    """
    rows, slots = size.shape
    per_device = slots // devices
    if per_device == 2:
        position = np.concatenate([np.arange(devices) * 2, np.arange(devices)[::-1] * 2 + 1])[None, :]
    else:
        position = _largest_first(size, devices)
    experts_at = np.empty_like(expert)
    sizes_at = np.empty_like(size)
    np.put_along_axis(experts_at, position, expert, axis=1)
    np.put_along_axis(sizes_at, position, size, axis=1)
    shape = (rows, devices, per_device)
    return Packing(experts_at.reshape(shape), sizes_at.reshape(shape))


def _largest_first(size: Floats, devices: int) -> Ints:
    """Slot of each replica when each goes to the least loaded device with a free slot; `size` falls along rows."""
    rows, slots = size.shape
    per_device = slots // devices
    slot = np.empty((rows, slots), np.int64)
    slot[:, :devices] = np.arange(devices) * per_device
    # The key is a device's load, or infinity once it is full. All first slots are taken before any second one.
    load = size[:, :devices].copy()
    key = load.copy() if per_device > 1 else np.full_like(load, np.inf)
    filled = np.ones((rows, devices), np.int64)
    first = np.arange(rows) * devices
    flat_load, flat_key, flat_filled = load.reshape(-1), key.reshape(-1), filled.reshape(-1)
    for k in range(devices, slots):
        device = key.argmin(axis=1)
        at = first + device
        used = flat_filled[at]
        slot[:, k] = device * per_device + used
        used += 1
        flat_filled[at] = used
        now = flat_load[at] + size[:, k]
        flat_load[at] = now
        now[used == per_device] = np.inf
        flat_key[at] = now
    return slot


def above(load: Floats, target: Floats, active: Ints) -> tuple[Ints, Ints, Floats]:
    """Of the rows `active` those whose fullest device lies above `target`, that device, and its load."""
    fullest = load[active].argmax(axis=1)
    top = load[active, fullest]
    busy = top > target[active]
    return active[busy], fullest[busy], top[busy]


def improve(packing: Packing, target: Floats, steps: int) -> None:
    """Lower the greatest device loads in place, by the best swap of one replica on the fullest device at a time.

    Stops at `target` [rows], where no swap helps, or after `steps` swaps. Pairs are already optimal.
    """
    rows, devices, per_device = packing.sizes.shape
    if per_device == 2 or devices == 1:
        return
    load = packing.sizes.sum(axis=2)
    active = np.arange(rows)
    for _ in range(steps):
        active, fullest, top = above(load, target, active)
        if not len(active):
            return
        partners, score, choice = _best_swap(packing.sizes, load, active, fullest, top, PARTNERS)
        stuck = np.flatnonzero(score >= top * _LEAST_GAIN)
        if len(stuck) and devices > PARTNERS:
            again = _best_swap(packing.sizes, load, active[stuck], fullest[stuck], top[stuck], devices)
            partners[stuck], score[stuck], choice[stuck] = again
        gains = score < top * _LEAST_GAIN
        active = active[gains]
        _swap(packing, load, active, fullest[gains], partners[gains], choice[gains])


def _best_swap(
    sizes: Floats, load: Floats, rows: Ints, fullest: Ints, top: Floats, partners: int
) -> tuple[Ints, Floats, Ints]:
    """For each of `rows` the swap after which the fuller of its two devices is lightest.

    Looks at the `partners` least loaded devices only. Returns the other device, the load after the swap, and which
    pair of slots is swapped (ours * slots per device + theirs).
    """
    at = np.arange(len(rows))
    if partners < load.shape[1]:
        others = np.argpartition(load[rows], partners, axis=1)[:, :partners]
    else:
        others = np.broadcast_to(np.arange(load.shape[1]), (len(rows), load.shape[1]))
    ours = sizes[rows, fullest]
    theirs = sizes[rows[:, None], others]
    moved = ours[:, None, :, None] - theirs[:, :, None, :]
    fuller = np.abs(moved - ((top[:, None] - load[rows[:, None], others]) / 2)[:, :, None, None])
    # max(top - moved, load + moved) = (top + load) / 2 + |moved - (top - load) / 2|
    fuller += ((top[:, None] + load[rows[:, None], others]) / 2)[:, :, None, None]
    fuller[others == fullest[:, None]] = np.inf
    flat = fuller.reshape(len(rows), -1)
    choice = flat.argmin(axis=1)
    other, pair = np.divmod(choice, sizes.shape[2] ** 2)
    return others[at, other], flat[at, choice], pair


def _swap(packing: Packing, load: Floats, rows: Ints, fullest: Ints, other: Ints, pair: Ints) -> None:
    ours, theirs = np.divmod(pair, packing.sizes.shape[2])
    for values in (packing.sizes, packing.experts):
        values[rows, fullest, ours], values[rows, other, theirs] = (
            values[rows, other, theirs],
            values[rows, fullest, ours],
        )
    for device in (fullest, other):
        load[rows, device] = packing.sizes[rows, device].sum(axis=1)
