"""Two slots a device: annealing over replica counts.

For given counts, pairing the largest replica with the smallest, the second largest with the second smallest and so
on is optimal, so a choice of counts can be scored by one sort. What is left is to choose the counts. The greatest pair
alone is a poor guide (most changes leave it as it is), so the chains lower the sum of what all pairs carry above a
goal slightly under the best load found so far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement.problem import Floats, Ints

# Chains for each row: four, or more where there are few rows.
_FEWEST_CHAINS, _MOST_CHAINS, _CHAINS_IN_ALL = 4, 48, 232
_GOAL = 1 - 5e-3
_TEMPERATURE = 1e-3
_MOST_STEPS = 1600
# Slots that all steps of all chains may sort together: about two seconds on one core.
_EFFORT = 110_000_000
_TRIES = 8


def greatest_pair(loads: Floats, counts: Ints) -> Floats:
    """Greatest device load of each row with the replicas paired optimally; rows of `counts` have an even sum."""
    size = loads / counts
    replicas = np.repeat(size.ravel(), counts.ravel()).reshape(len(loads), -1)
    return np.asarray(_pairs(replicas).max(axis=1))


def anneal(rng: np.random.Generator, loads: Floats, counts: Ints, effort: float = 1.0) -> Ints:
    """Replica counts [rows, experts] at least as good as `counts`; `effort` scales the length of the annealing."""
    chains = _Chains(loads, counts)
    total, slots = chains.slot_expert.shape
    steps = max(1, int(effort * min(_MOST_STEPS, _EFFORT // (total * slots))))
    for step in range(steps):
        chains.step(rng, _TEMPERATURE * (1 - step / steps))
    return chains.best_counts


def _pairs(replicas: NDArray[np.floating]) -> NDArray[np.floating]:
    """Loads of the optimal pairs of each row of replica sizes; sorts `replicas` in place."""
    replicas.sort(axis=1)
    half = replicas.shape[1] // 2
    return np.asarray(replicas[:, :half] + replicas[:, : half - 1 : -1])


class _Chains:
    """Several annealing chains for each row, all advanced together. Sizes are float32: they only steer."""

    def __init__(self, loads: Floats, counts: Ints) -> None:
        self.rows, self.experts = loads.shape
        self.chains = int(np.clip(_CHAINS_IN_ALL // self.rows, _FEWEST_CHAINS, _MOST_CHAINS))
        self.exact_loads = loads
        self.best = greatest_pair(loads, counts)
        self.best_counts = counts.copy()
        self.loads = np.repeat(loads, self.chains, axis=0).astype(np.float32)
        self.counts = np.repeat(counts, self.chains, axis=0)
        self.size = self.loads / self.counts.astype(np.float32)
        self.chain = np.arange(len(self.loads))
        self.offset = (self.chain * self.experts)[:, None]
        expert = np.repeat(np.tile(np.arange(self.experts), self.rows), counts.ravel()).reshape(self.rows, -1)
        self.slot_expert = np.repeat(expert, self.chains, axis=0)
        self._aim()

    def _aim(self) -> None:
        self.goal = np.repeat(self.best * _GOAL, self.chains).astype(np.float32)
        self.excess, _ = self._measure()

    def _measure(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What the pairs of each chain carry above its goal, and the greatest pair."""
        pairs = _pairs(self.size.take(self.slot_expert + self.offset))
        greatest = pairs.max(axis=1)
        pairs -= self.goal[:, None]
        np.maximum(pairs, 0, out=pairs)
        return pairs.sum(axis=1), greatest

    def step(self, rng: np.random.Generator, temperature: float) -> None:
        """Give one slot of each chain to another expert; keep the change by Metropolis' rule."""
        slot, donor, replicated, possible = self._spare_slots(rng)
        # Half of the time an expert with several replicas: spare replicas do the least harm on a single light expert.
        receiver = rng.integers(self.experts, size=len(self.chain))
        receiver = np.where(rng.random(len(self.chain)) < 0.5, replicated, receiver)
        on = np.flatnonzero(possible & (receiver != donor))
        slot, donor, receiver = slot[on], donor[on], receiver[on]
        self._move(on, slot, donor, receiver)
        excess, greatest = self._measure()
        rise = np.maximum(excess[on] - self.excess[on], 0)
        accepted = rng.random(len(on)) < np.exp(-rise / (temperature * self.goal[on] + np.float32(1e-30)))
        back = ~accepted
        self._move(on[back], slot[back], receiver[back], donor[back])
        self.excess[on[accepted]] = excess[on[accepted]]
        greatest[on[back]] = np.inf
        self._record(greatest)

    def _spare_slots(self, rng: np.random.Generator) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
        """Two random slots of each chain that hold replicated experts.

        Returns the first slot, its expert, the expert of the second slot (maybe the same), and whether any was found.
        """
        slots = rng.integers(self.slot_expert.shape[1], size=(len(self.chain), _TRIES))
        experts = self.slot_expert[self.chain[:, None], slots]
        spare = self.counts[self.chain[:, None], experts] > 1
        first = spare.argmax(axis=1)
        last = _TRIES - 1 - spare[:, ::-1].argmax(axis=1)
        at = self.chain
        return slots[at, first], experts[at, first], experts[at, last], spare[at, first]

    def _move(self, chain: Ints, slot: Ints, donor: Ints, receiver: Ints) -> None:
        self.slot_expert[chain, slot] = receiver
        for expert, change in ((donor, -1), (receiver, 1)):
            self.counts[chain, expert] += change
            self.size[chain, expert] = self.loads[chain, expert] / self.counts[chain, expert]

    def _record(self, greatest: NDArray[np.float32]) -> None:
        by_row = greatest.reshape(self.rows, self.chains)
        chosen = by_row.argmin(axis=1)
        rows = np.flatnonzero(by_row[np.arange(self.rows), chosen] < self.best * (1 - 1e-6))
        if not len(rows):
            return
        counts = self.counts[rows * self.chains + chosen[rows]]
        exact = greatest_pair(self.exact_loads[rows], counts)
        better = exact < self.best[rows]
        self.best[rows[better]] = exact[better]
        self.best_counts[rows[better]] = counts[better]
        if better.any():
            self._aim()
