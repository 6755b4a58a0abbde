"""Search for replica counts and a packing with the smallest greatest device load, for many layers at once.

Nearly all of the gain over greedy replication lies in the counts: heavy replicas of awkward sizes cannot be packed
well by anybody. So the search varies the counts, scores each choice by a quick packing with a few swaps, and polishes
the best. Rows that reach their target leave the batch. Everything is deterministic: effort is counted in work, not in
seconds.
"""

from __future__ import annotations

import numpy as np

from moec.passes.placement.counts import mutate, spread_widest, starting_counts
from moec.passes.placement.packing import PARTNERS, Packing, improve, pack
from moec.passes.placement.pairs import anneal
from moec.passes.placement.problem import Floats, Ints
from moec.passes.placement.resplit import resplit

# Swaps go on until the greatest device load is this near the target (cheap); other replica counts are tried only for
# rows that are further away than the second figure (dear).
_POLISHED = 1 + 2e-4
_FINISHED = 1 + 7e-4
_QUICK_SWAPS = 10
_POLISH_SWAPS = 300
_LIMITS = 9
_FEWEST_COPIES, _MOST_COPIES = 8, 256
# Numbers that the rounds of random changes may look at in all: about two seconds on one core.
_EFFORT = 150_000_000
# Small batches cost more a number than large ones: they stop after so many rounds.
_MOST_ROUNDS = 100


def search(loads: Floats, devices: int, slots: int, target: Floats, *, effort: float = 1.0, seed: int = 0) -> Packing:
    """Place every expert of `loads` [rows, experts] with even shares; never worse than greedy replication.

    `target` [rows] is the load to approach, for example the lower bound; `effort` scales the time that rows
    far from it may take. The search begins with the greedy counts packed largest first and only accepts improvements.
    """
    counts = spread_widest(loads, slots)
    best = pack(loads, counts, devices)
    if slots == devices:
        return best
    improve(best, target * _POLISHED, _POLISH_SWAPS)
    resplit(best, target * _POLISHED, _POLISH_SWAPS)
    state = _State(loads, devices, target, counts, best)
    state.try_starts(slots)
    rng = np.random.default_rng(seed)
    if slots == 2 * devices:
        state.anneal_pairs(rng, effort)
    else:
        state.try_changes(rng, effort)
    return state.best


class _State:
    """Best counts and packing so far, of every row."""

    def __init__(self, loads: Floats, devices: int, target: Floats, counts: Ints, best: Packing) -> None:
        self.loads, self.devices, self.target = loads, devices, target
        self.counts, self.best = counts, best
        self.greatest = best.greatest

    def unfinished(self) -> Ints:
        return np.flatnonzero(self.greatest > self.target * _FINISHED)

    def try_starts(self, slots: int) -> None:
        rows = self.unfinished()
        if not len(rows):
            return
        # One packing per start in lockstep; the best start of each row is then polished.
        starts = starting_counts(self.loads[rows], self.devices, slots, self.target[rows], _LIMITS)
        best_counts = self.counts[rows]
        best_score = np.full(len(rows), np.inf)
        for counts in starts:
            score = self._score(rows, counts)
            better = score < best_score
            best_score[better], best_counts[better] = score[better], counts[better]
        self._accept(rows, best_counts)

    def anneal_pairs(self, rng: np.random.Generator, effort: float) -> None:
        rows = self.unfinished()
        if len(rows):
            self._accept(rows, anneal(rng, self.loads[rows], self.counts[rows], effort))

    def try_changes(self, rng: np.random.Generator, effort: float) -> None:
        slots = int(self.counts[0].sum())
        per_device = slots // self.devices
        swaps = _QUICK_SWAPS * min(PARTNERS, self.devices) * per_device**2
        cost = slots * self.devices + swaps
        left = effort * _EFFORT
        for _ in range(int(_MOST_ROUNDS * effort)):
            rows = self.unfinished()
            if not len(rows) or left <= 0:
                return
            copies = int(np.clip(512 // len(rows), _FEWEST_COPIES, _MOST_COPIES))
            left -= len(rows) * copies * cost
            counts = mutate(rng, self.loads[rows], self.counts[rows], copies)
            score = self._score(np.repeat(rows, copies), counts).reshape(len(rows), copies)
            chosen = np.arange(len(rows)) * copies + score.argmin(axis=1)
            self._accept(rows, counts[chosen])

    def _score(self, rows: Ints, counts: Ints) -> Floats:
        packing = pack(self.loads[rows], counts, self.devices)
        improve(packing, self.target[rows] * _POLISHED, _QUICK_SWAPS)
        return packing.greatest

    def _accept(self, rows: Ints, counts: Ints) -> None:
        packing = pack(self.loads[rows], counts, self.devices)
        improve(packing, self.target[rows] * _POLISHED, _POLISH_SWAPS)
        resplit(packing, self.target[rows] * _POLISHED, _POLISH_SWAPS)
        greatest = packing.greatest
        better = np.flatnonzero(greatest < self.greatest[rows])
        self.counts[rows[better]] = counts[better]
        self.greatest[rows[better]] = greatest[better]
        self.best.replace(rows[better], packing.take(better))
