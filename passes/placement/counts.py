"""How many replicas each expert gets: starting points and random changes for the search, all in batches of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement.problem import Floats, Ints

# Exponents of the replica size with which an expert is drawn to give up or to receive a replica: negative ones favour
# experts with small replicas, 0 draws evenly, large ones go for the heaviest.
_EXPONENTS = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 4.0])
_MOST_MOVES = 4
# Replicas of about this part of a device's load pair up well; one way to spend spare replicas makes more of them.
_MEDIUM = 0.3
_FINE_LIMITS = 96


def spread_widest(loads: Floats, slots: int) -> Ints:
    """Replica counts that minimise the largest replica: each further replica goes to the expert with the largest.

    `loads` [rows, experts] -> int64[rows, experts], rows summing to `slots`. Optimal for one slot a device.
    """
    rows, experts = loads.shape
    counts = np.ones((rows, experts), np.int64)
    size = loads.copy()
    row = np.arange(rows)
    for _ in range(slots - experts):
        largest = size.argmax(axis=1)
        counts[row, largest] += 1
        size[row, largest] = loads[row, largest] / counts[row, largest]
    return counts


def starting_counts(loads: Floats, devices: int, slots: int, bound: Floats, steps: int) -> Iterator[Ints]:
    """Replica counts worth packing, one batch [rows, experts] at a time.

    The size limit of a replica runs from the smallest that the slots allow up to the bound on the device load. Each
    limit fixes how many replicas the heavy experts need; what is spare goes to the largest replicas, to the
    lightest experts (which keeps the heavy replicas few and large), or to replicas of medium size. Limits in the
    middle are tried first: they are the ones that mostly win. One more limit is the smallest at which the replicas of
    all replicated experts fit on a device each.
    """
    widest = spread_widest(loads, slots)
    least = (loads / widest).max(axis=1)
    span = np.where(least > 0, np.maximum(bound, least) / np.where(least > 0, least, 1.0), 1.0)
    from_the_middle = sorted(np.linspace(0.0, 1.0, steps).tolist(), key=lambda f: abs(f - 0.5))
    fractions = [np.full(len(loads), fraction) for fraction in from_the_middle]
    for fraction in [*fractions, _one_a_device(loads, devices, least, span)]:
        limit = np.where(least > 0, least * span**fraction, 1.0)[:, None]
        # The tolerance keeps a load that is an exact multiple of the limit from gaining a replica by rounding.
        needed = np.maximum(1, np.ceil(loads / limit - 1e-9)).astype(np.int64)
        over = needed.sum(axis=1) > slots
        needed[over] = widest[over]
        size = loads / needed
        yield _spend(needed, size, slots)
        yield _spend(needed, -loads, slots)
        tiny = np.finfo(np.float64).tiny
        yield _spend(needed, -np.abs(np.log((size + tiny) / (_MEDIUM * bound[:, None] + tiny))), slots)


def _one_a_device(loads: Floats, devices: int, least: Floats, span: Floats) -> Floats:
    """Where between `least` and `least * span` the replicas of replicated experts are first as few as the devices."""
    found = np.ones(len(loads))
    for fraction in np.linspace(1.0, 0.0, _FINE_LIMITS):
        limit = np.where(least > 0, least * span**fraction, 1.0)[:, None]
        needed = np.ceil(loads / limit - 1e-9)
        fits = np.where(needed > 1, needed, 0).sum(axis=1) <= devices
        found = np.where(fits, fraction, found)
    return found


def _spend(counts: Ints, preference: Floats, slots: int) -> Ints:
    """`counts` raised to sum to `slots`, one replica an expert in falling order of `preference`, then round again."""
    experts = counts.shape[1]
    order = np.argsort(-preference, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(experts)[None, :], axis=1)
    each, left = np.divmod(slots - counts.sum(axis=1), experts)
    return np.asarray(counts + each[:, None] + (rank < left[:, None]))


def mutate(rng: np.random.Generator, loads: Floats, counts: Ints, copies: int) -> Ints:
    """Random neighbours of `counts` [rows, experts]: int64[rows * copies, experts], row sums unchanged.

    Each neighbour moves one to four replicas from experts that have more than one to others, with a preference for
    heavy or light experts that is itself drawn.
    """
    rows = len(counts)
    total = rows * copies
    changed = np.repeat(counts, copies, axis=0)
    row = np.repeat(np.arange(rows), copies)
    giver = _Lottery(loads, counts, counts > 1)
    taker = _Lottery(loads, counts, np.ones_like(counts, dtype=bool))
    kind = rng.integers(len(_EXPONENTS), size=(2, total))
    moves = np.minimum(rng.geometric(0.5, size=total), _MOST_MOVES)
    sticky = rng.random(size=(2, total)) < 0.5
    donors = giver.draw(rng, row, kind[0])
    receivers = taker.draw(rng, row, kind[1])
    for move in range(_MOST_MOVES):
        on = np.flatnonzero(moves > move)
        if move:
            fresh = on[~sticky[0, on]]
            donors[fresh] = giver.draw(rng, row[fresh], kind[0, fresh])
            fresh = on[~sticky[1, on]]
            receivers[fresh] = taker.draw(rng, row[fresh], kind[1, fresh])
        donor, receiver = donors[on], receivers[on]
        can = (changed[on, donor] > 1) & (donor != receiver)
        changed[on[can], donor[can]] -= 1
        changed[on[can], receiver[can]] += 1
    return changed


class _Lottery:
    """Draws experts with probability proportional to a power of the size of their replicas, among those allowed."""

    def __init__(self, loads: Floats, counts: Ints, allowed: NDArray[np.bool_]) -> None:
        size = loads / counts
        # Relative to the largest and kept from zero, so that no power overflows and experts without load take part.
        size = np.maximum(size / np.maximum(size.max(axis=1, keepdims=True), np.finfo(np.float64).tiny), 1e-6)
        weight = size[:, None, :] ** _EXPONENTS[None, :, None] * allowed[:, None, :]
        reach = weight.cumsum(axis=2)
        last = np.where(reach[..., -1:] > 0, reach[..., -1:], 1.0)
        self.experts = counts.shape[1]
        # Every (row, exponent) has its own unit interval on one line: a single sorted search serves all draws.
        self.line = (reach / last + np.arange(reach[..., 0].size).reshape(reach.shape[:2])[..., None]).ravel()

    def draw(self, rng: np.random.Generator, row: Ints, kind: Ints) -> Ints:
        interval = row * len(_EXPONENTS) + kind
        at = np.searchsorted(self.line, interval + rng.random(len(row)), side="right")
        return np.asarray(np.clip(at - interval * self.experts, 0, self.experts - 1))
