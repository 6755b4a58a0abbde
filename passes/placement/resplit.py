"""Replicas of two devices shared out anew: the best of all ways to split them, the fullest device first.

Swapping one replica for one stops where no single swap helps; with few slots a device the ways to split two devices'
replicas are few enough to try them all.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np

from moec.passes.placement.packing import Packing, above
from moec.passes.placement.problem import Floats

# Twelve replicas split in 462 ways, fourteen already in 1716. Pairs are optimal as they are.
_FEWEST_SLOTS, _MOST_SLOTS = 3, 6
# A gain below rounding would let two splits undo each other for ever.
_LEAST_GAIN = 1 - 1e-12


@cache
def _splits(per_device: int) -> Floats:
    """All ways to split the replicas of two devices, float64[ways, 2 * slots]: 1 for those of the first device."""
    first = [(0, *rest) for rest in combinations(range(1, 2 * per_device), per_device - 1)]
    masks = np.zeros((len(first), 2 * per_device))
    for row, members in enumerate(first):
        masks[row, list(members)] = 1
    return masks


def resplit(packing: Packing, target: Floats, steps: int) -> None:
    """Lower the greatest device loads in place; stops at `target` [rows], where no split helps, or after `steps`.

    With other than three to six slots a device nothing is done.
    """
    rows, _, n = packing.sizes.shape
    if not _FEWEST_SLOTS <= n <= _MOST_SLOTS:
        return
    masks = _splits(n)
    load = packing.sizes.sum(axis=2)
    active = np.arange(rows)
    for _ in range(steps):
        active, fullest, top = above(load, target, active)
        if not len(active):
            return
        at = np.arange(len(active))
        sizes = packing.sizes[active]
        ours = sizes[at, fullest]
        sums = (sizes @ masks[:, n:].T) + (ours @ masks[:, :n].T)[:, None, :]
        both = load[active] + top[:, None]
        worst = np.abs(sums - both[:, :, None] / 2) + both[:, :, None] / 2
        worst[at, fullest] = np.inf
        flat = worst.reshape(len(active), -1)
        choice = flat.argmin(axis=1)
        gains = flat[at, choice] < top * _LEAST_GAIN
        active, fullest, choice = active[gains], fullest[gains], choice[gains]
        if not len(active):
            return
        other, split = np.divmod(choice, len(masks))
        order = np.argsort(-masks[split], axis=1, kind="stable")
        for values in (packing.sizes, packing.experts):
            joined = np.concatenate([values[active, fullest], values[active, other]], axis=1)
            joined = np.take_along_axis(joined, order, axis=1)
            values[active, fullest], values[active, other] = joined[:, :n], joined[:, n:]
        for device in (fullest, other):
            load[active, device] = packing.sizes[active, device].sum(axis=1)
