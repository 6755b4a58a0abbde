"""Lower bounds on the greatest device load: no placement of the given loads can do better."""

from __future__ import annotations

import numpy as np

from moec.passes.placement.counts import spread_widest
from moec.passes.placement.problem import Floats


def lower_bound(loads: Floats, devices: int, slots: int, *, even: bool = True) -> Floats:
    """Greatest of three lower bounds for each row of `loads` [rows, experts]; float64[rows].

    Mean load: some device carries at least the average. Prefix: the k heaviest experts find at most
    `slots - experts + k` slots, since every other expert needs one, and no more devices than that. Replica size (only
    when the replicas of an expert take even shares): the least T with sum(ceil(load / T)) <= slots; greedy
    replication reaches it, as each further replica goes to the expert whose replicas are largest.
    """
    experts = loads.shape[1]
    mean = loads.sum(axis=1) / devices
    heaviest = -np.sort(-loads, axis=1)
    reach = np.minimum(devices, slots - experts + np.arange(1, experts + 1))
    prefix = (heaviest.cumsum(axis=1) / reach).max(axis=1)
    bound = np.maximum(mean, prefix)
    if even:
        replica = (loads / spread_widest(loads, slots)).max(axis=1)
        bound = np.maximum(bound, replica)
    return np.asarray(bound)
