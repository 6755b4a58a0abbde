"""A sharper lower bound for loads with a few heavy experts: what their replicas leave room for.

Only few redundant slots share out the heavy experts, so every way to give them replicas can be looked at. For each way
the replicas are bins' largest items, and four things count that the simple bounds do not see: large replicas that
cannot share a device close it to others (Martello and Toth 1990, "Knapsack Problems", section 8.3, bound L2); a device
with a large replica must still fill its other slots, so that it carries some of the light experts as well; few spare
slots leave few slots to replicas of light experts, so that most devices fill up with whole ones; and devices without a
heavy replica carry no more than the heaviest of the light experts do, which leaves the more to the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import comb

import numpy as np

from moec.passes.placement.problem import Floats, Ints

_MOST_WAYS = 2000
_MOST_HEAVY = 5
# Numbers looked at for all rows: about half a second. With many spare slots this bound has little to say anyway.
_MOST_NUMBERS = 60_000_000
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
        if len(loads) * comb(spare + heavy, heavy) * min(devices, spare + heavy) * (spare + heavy) > _MOST_NUMBERS:
            break
        ways = ways_to_replicate(spare, heavy)
        rows = max(1, _AT_ONCE // (len(ways) * (spare + heavy)))
        for first in range(0, len(loads), rows):
            part = slice(first, first + rows)
            out[part] = np.maximum(out[part], _bound(falling[part], heavy, ways, devices, slots))
    return out


@cache
def ways_to_replicate(spare: int, heavy: int) -> Ints:
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
    for row, counts in enumerate(ways):
        owner[row, : count[row]] = np.repeat(np.arange(heavy), counts)
    sizes = np.concatenate([falling[:, None, :heavy] / ways, np.zeros((rows, len(ways), 1))], axis=2)
    sizes = -np.sort(-np.take_along_axis(sizes, np.broadcast_to(owner, (rows, *owner.shape)), axis=2), axis=2)
    sums = np.concatenate([np.zeros((rows, len(ways), 1)), sizes.cumsum(axis=2)], axis=2)
    # Lightest experts first: the k smallest replicas of light experts carry at least what the k - spare lightest do,
    # for the largest of the others are no more than as many whole experts.
    light = np.concatenate([np.zeros((rows, 1)), falling[:, heavy:][:, ::-1].cumsum(axis=1)], axis=1)

    def lightest(number: Ints) -> Floats:
        """Least that so many different light experts carry together: `number` int64[ways] -> [rows, ways]."""
        return np.asarray(light[:, np.clip(number, 0, experts - heavy)])

    way = np.arange(len(ways))
    # Two heavy replicas on a device leave it `rest` slots for light ones; nothing is counted for these where other
    # heavy replicas are lighter still.
    rest = np.clip(per_device - 2 - spare, 0, experts - heavy)
    fits = sizes[:, way, count - 1] >= falling[:, experts - np.maximum(rest, 1)]
    filling = np.where(fits, lightest(rest), 0.0)
    # With heavy replicas on m devices, the others hold light experts alone. Two on one device: m is below their number.
    holding = np.arange(1, devices + 1)
    others = np.minimum((devices - holding) * per_device, experts - heavy)
    most_light = np.concatenate([np.zeros((rows, 1)), falling[:, heavy:].cumsum(axis=1)], axis=1)
    left = (falling.sum(axis=1, keepdims=True) - most_light[:, others]) / holding
    crowded = np.minimum.accumulate(left, axis=1)[:, np.clip(count - 1, 1, devices) - 1]
    pair = np.where(count > 1, sizes[:, way, count - 1] + sizes[:, way, np.maximum(count - 2, 0)] + filling, np.inf)
    pair = np.maximum(pair, np.where(count > 1, crowded, np.inf))
    found = np.zeros((rows, len(ways)))
    for large in range(1, min(devices, most) + 1):
        least = sizes[:, :, large - 1]
        # No two heavy replicas share a device, so that each has all other slots for light ones; or two do.
        alone = (sums[:, :, large] + lightest(np.full_like(count, large * (per_device - 1)) - spare)) / large
        found = np.maximum(found, np.where(count >= large, np.minimum(alone, pair), 0.0))
        filled = large * (per_device - 1) - (count - large)
        apart = (sums[:, :, large] + lightest(filled - spare)) / large
        # Replicas of light experts stand in 2 * spare slots at most: all other devices hold whole ones.
        whole = np.maximum(large - 2 * spare, 0)
        own = sums[:, :, large] - sums[:, way, large - whole] + lightest(whole * (per_device - 1) - (count - large))
        apart = np.maximum(apart, np.where(whole > 0, own / np.maximum(whole, 1), 0.0))
        # Fewer replicas than `large`: the mean over devices says nothing of them.
        apart = np.where(count >= large, apart, 0.0)
        found = np.maximum(found, apart if large == 1 else np.minimum(apart, np.maximum(2 * least + filling, crowded)))
        for last in range(large + 1, most + 1):
            together = least + sizes[:, :, last - 1] + filling
            if large < devices:
                closed = (sums[:, :, last] - sums[:, :, large]) / (devices - large)
                together = np.minimum(together, closed)
            found = np.maximum(found, np.where(count >= last, together, 0.0))
    return np.asarray(found.min(axis=1))
