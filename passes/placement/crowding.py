"""A sharper lower bound for loads with a few heavy experts: what their replicas leave room for.

Only few redundant slots share out the heavy experts, so every way to give them replicas can be looked at. For each way
the replicas are bins' largest items, and two things count that the simple bounds do not see: large replicas that
cannot share a device close it to others (Martello and Toth 1990, "Knapsack Problems", section 8.3, bound L2), and a
device with a large replica must still fill its other slots, so that it carries some of the light experts as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import comb

import numpy as np

from moec.passes.placement.problem import Floats, Ints

_MOST_WAYS = 2000
_MOST_HEAVY = 5
# Numbers that are looked at together.
_AT_ONCE = 2_000_000


def crowded_bound(loads: Floats, devices: int, slots: int) -> Floats:
    """Lower bound on the greatest device load with even shares; float64[rows] for `loads` [rows, experts].

    The greatest of those with one to five experts taken for heavy, as far as the ways to replicate them can be listed.
    """
    spare, experts = slots - loads.shape[1], loads.shape[1]
    out = np.zeros(len(loads))
    falling = -np.sort(-loads, axis=1)
    for heavy in range(1, min(_MOST_HEAVY, experts - 1) + 1):
        if comb(spare + heavy, heavy) > _MOST_WAYS:
            break
        ways = _ways(spare, heavy)
        rows = max(1, _AT_ONCE // (len(ways) * (spare + heavy)))
        for first in range(0, len(loads), rows):
            part = slice(first, first + rows)
            out[part] = np.maximum(out[part], _bound(falling[part], heavy, ways, devices, slots))
    return out


@cache
def _ways(spare: int, heavy: int) -> Ints:
    """Replica counts [ways, heavy] of at most `spare` replicas beyond the first ones."""

    def split(left: int, more: int) -> Iterator[tuple[int, ...]]:
        if not more:
            yield ()
            return
        for extra in range(left + 1):
            for rest in split(left - extra, more - 1):
                yield (1 + extra, *rest)

    return np.array(list(split(spare, heavy)), dtype=np.int64)


def _bound(falling: Floats, heavy: int, ways: Ints, devices: int, slots: int) -> Floats:
    """For each row the least over all ways of what some device carries at least."""
    rows, experts = falling.shape
    per_device, most = slots // devices, slots - experts + heavy
    count = ways.sum(axis=1)
    spare = slots - experts - (count - heavy)
    # Replicas of heavy experts of every way, largest first, filled up with zeros: [rows, ways, most].
    owner = np.full((len(ways), most), heavy)
    for way, counts in enumerate(ways):
        owner[way, : count[way]] = np.repeat(np.arange(heavy), counts)
    sizes = np.concatenate([falling[:, None, :heavy] / ways, np.zeros((rows, len(ways), 1))], axis=2)
    sizes = -np.sort(-np.take_along_axis(sizes, np.broadcast_to(owner, (rows, *owner.shape)), axis=2), axis=2)
    sums = np.concatenate([np.zeros((rows, len(ways), 1)), sizes.cumsum(axis=2)], axis=2)
    # Lightest experts first: the k smallest replicas of light experts carry at least what the k - spare lightest do,
    # for the largest of the others are no more than as many whole experts.
    light = np.concatenate([np.zeros((rows, 1)), falling[:, heavy:][:, ::-1].cumsum(axis=1)], axis=1)
    found = np.zeros((rows, len(ways)))
    for large in range(1, min(devices, most) + 1):
        least = sizes[:, :, large - 1]
        filled = np.clip(large * (per_device - 1) - (count - large) - spare, 0, experts - heavy)
        apart = (sums[:, :, large] + np.take_along_axis(light, np.broadcast_to(filled, found.shape), axis=1)) / large
        # Fewer replicas than `large`: the mean over devices says nothing of them.
        apart = np.where(count >= large, apart, 0.0)
        found = np.maximum(found, apart if large == 1 else np.minimum(apart, 2 * least))
        for last in range(large + 1, most + 1):
            together = least + sizes[:, :, last - 1]
            if large < devices:
                closed = (sums[:, :, last] - sums[:, :, large]) / (devices - large)
                together = np.minimum(together, closed)
            found = np.maximum(found, np.where(count >= last, together, 0.0))
    return np.asarray(found.min(axis=1))
