"""Few spare slots and a few heavy experts: branch and bound over their replicas, for one sub-problem at a time.

Where only a handful of redundant slots share out loads that fall steeply, the heavy experts decide: all ways to give
them replicas can be listed, and each asks whether these replicas fit on the devices below some load, the light experts
taken for a fluid. No way fits: the load is a proven lower bound. Some do: the light experts are added to them, and the
swaps of `packing` finish what is then a placement. Bin packing by best fit and, where that fails, exhaustively, after
Martello and Toth (1990), "Knapsack Problems", chapter 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import comb

import numpy as np
from numpy.typing import NDArray

from moec.passes.placement.crowding import ways_to_replicate
from moec.passes.placement.packing import Packing, improve
from moec.passes.placement.problem import Floats, Ints
from moec.passes.placement.resplit import resplit

_MOST_WAYS = 1500
_MOST_HEAVY = 10
# Numbers that packing by best fit may look at for one question: what needs more has many spare slots.
_MOST_NUMBERS = 1_000_000
# Steps of the exhaustive packing: for one way to replicate, and for one sub-problem. Looking at what a packing of all
# heavy ones leaves costs as much as some steps.
_STEPS_A_WAY, _STEPS = 3000, 25_000
_STEPS_A_LOOK = 8
_COMPLETED = 48
_POLISH_SWAPS = 300
# A placement counts as optimal this near to its bound; improvements are asked for in such steps.
_STEP = 1 - 5e-4
_BISECTIONS = 6
_ROUNDING = 1 + 1e-12


@dataclass
class _Budget:
    """Steps that exhaustive packings may still take (some 3 us each): questions beyond them stay open."""

    steps: int


@dataclass(frozen=True)
class _Fit:
    """Replica counts of the heavy experts, and the device of each of their replicas, the largest replica first."""

    counts: Ints
    owners: Ints
    devices: list[int]


def settle(loads: Floats, devices: int, slots: int, packing: Packing, bound: float) -> tuple[Packing, float]:
    """A packing [1, devices, slots per device] of `loads` [experts] no worse than `packing`, and a lower bound.

    The bound is at least `bound`, a lower bound already known. Even shares.
    """
    greatest = float(packing.greatest[0])
    heavy = _Heavy(loads, devices, slots, _Budget(_STEPS))
    while greatest * _STEP > bound:
        fits = heavy.fits(greatest * _STEP)
        if fits is None:
            break
        if not fits:
            return packing, greatest * _STEP
        found = heavy.completed(fits, bound)
        best = int(found.greatest.argmin())
        if found.greatest[best] > greatest * _STEP:
            break
        packing = found.take(np.array([best]))
        greatest = float(packing.greatest[0])
    above = greatest
    for _ in range(_BISECTIONS):
        middle = (bound + above) / 2
        if heavy.fits(middle) == []:
            bound = middle
        else:
            above = middle
    return packing, bound


class _Heavy:
    """One sub-problem, its experts by falling load."""

    def __init__(self, loads: Floats, devices: int, slots: int, budget: _Budget) -> None:
        self.budget = budget
        self.order = np.argsort(-loads, kind="stable")
        self.loads = loads[self.order]
        self.devices, self.slots, self.per_device = devices, slots, slots // devices
        self.spare = slots - len(loads)

    def fits(self, limit: float) -> list[_Fit] | None:
        """Ways to replicate the heavy experts so that no device need carry more than `limit`.

        Empty: there is none, whatever becomes of the light experts. None: that could not be found out.
        """
        fewest = np.maximum(1, np.ceil(self.loads / (limit * _ROUNDING))).astype(np.int64)
        left = self.spare - np.cumsum(fewest - 1)
        if left[-1] < 0:
            return []
        heavy = max(
            (k for k in range(1, min(_MOST_HEAVY, len(left) - 1) + 1) if comb(int(left[k - 1]) + k, k) <= _MOST_WAYS),
            default=0,
        )
        if not heavy:
            return None
        counts = fewest[:heavy] + ways_to_replicate(int(left[heavy - 1]), heavy) - 1
        if len(counts) * int(counts.sum(axis=1).max()) * self.devices > _MOST_NUMBERS:
            return None
        room = _Room.of(self.loads, counts, self.per_device, self.spare - (counts - 1).sum(axis=1), limit)
        return self._packed(counts, room)

    def _packed(self, counts: Ints, room: _Room) -> list[_Fit] | None:
        """Those of `counts` [ways, heavy] whose replicas fit, None when some question stays open and none fits."""
        ways, heavy = counts.shape
        total = counts.sum(axis=1)
        owner = np.full((ways, int(total.max())), heavy)
        for way, row in enumerate(counts):
            owner[way, : total[way]] = np.repeat(np.arange(heavy), row)
        size = np.concatenate([self.loads[:heavy] / counts, np.zeros((ways, 1))], axis=1)
        size = np.take_along_axis(size, owner, axis=1)
        by_size = np.argsort(-size, axis=1, kind="stable")
        owner, size = np.take_along_axis(owner, by_size, axis=1), np.take_along_axis(size, by_size, axis=1)
        where, done = _best_fit(size, total, self.devices, room)
        found = [_Fit(counts[w], owner[w, : total[w]], where[w, : total[w]].tolist()) for w in np.flatnonzero(done)]
        stopped = False
        for way in np.flatnonzero(~done):
            search = _Exhaustive(size[way, : total[way]].tolist(), self.devices, room, int(way), self.budget)
            devices = search.run()
            stopped |= search.stopped
            if devices is not None:
                found.append(_Fit(counts[way], owner[way, : total[way]], devices))
        return None if stopped and not found else found

    def completed(self, fits: list[_Fit], target: float) -> Packing:
        """Placements of all experts that begin with the first of `fits`: [fits, devices, slots per device]."""
        chosen = fits[:: -(-len(fits) // _COMPLETED)]
        shape = (len(chosen), self.devices, self.per_device)
        packing = Packing(np.empty(shape, np.int64), np.empty(shape))
        for row, fit in enumerate(chosen):
            self._fill(fit, packing.experts[row], packing.sizes[row])
        goal = np.full(len(chosen), target)
        improve(packing, goal, _POLISH_SWAPS)
        resplit(packing, goal, _POLISH_SWAPS)
        packing.experts = self.order[packing.experts]
        return packing

    def _fill(self, fit: _Fit, experts: Ints, sizes: Floats) -> None:
        """Put the heavy replicas where `fit` says and the light ones, largest first, where least is."""
        heavy = len(fit.counts)
        counts = np.concatenate([fit.counts, np.ones(len(self.loads) - heavy, np.int64)])
        # What is spare goes to the largest light replicas.
        largest = [(-float(load), e) for e, load in enumerate(self.loads[heavy:], start=heavy)]
        heapify(largest)
        for _ in range(self.slots - int(counts.sum())):
            expert = largest[0][1]
            counts[expert] += 1
            heapreplace(largest, (-float(self.loads[expert] / counts[expert]), expert))
        each = self.loads / counts
        load, used = np.zeros(self.devices), np.zeros(self.devices, np.int64)

        def put(expert: int, device: int) -> None:
            experts[device, used[device]], sizes[device, used[device]] = expert, each[expert]
            load[device] += each[expert]
            used[device] += 1

        for expert, device in zip(fit.owners.tolist(), fit.devices, strict=True):
            put(expert, device)
        light = np.repeat(np.arange(heavy, len(counts)), counts[heavy:])
        for expert in light[np.argsort(-each[light], kind="stable")].tolist():
            put(expert, int(np.where(used < self.per_device, load, np.inf).argmin()))


@dataclass(frozen=True)
class _Room:
    """What light experts leave of a device: with j heavy replicas on it, its other slots must be filled as well.

    These carry at least `least` [ways, j]: m replicas of light experts, with s spare ones among all, weigh as much as
    the m - s lightest, and of those none counts for more than the smallest heavy replica, which might come there yet.
    Light ones alone carry at most `most` [j], the heaviest; together the light experts weigh `light`.
    """

    limit: float
    least: Floats
    most: Floats
    light: float

    @staticmethod
    def of(loads: Floats, counts: Ints, per_device: int, spare: Ints, limit: float) -> _Room:
        """`loads` by falling load, `counts` [ways, heavy]; `spare` [ways] are the replicas left to light experts."""
        heavy = counts.shape[1]
        free = per_device - np.arange(per_device + 1)
        light = loads[heavy:]
        falling = np.concatenate([[0.0], light.cumsum()])
        smallest = (loads[:heavy] / counts).min(axis=1, keepdims=True)
        rising = np.concatenate([np.zeros_like(smallest), np.minimum(light[::-1], smallest).cumsum(axis=1)], axis=1)
        least = np.take_along_axis(rising, np.clip(free - spare[:, None], 0, len(light)), axis=1)
        return _Room(limit * _ROUNDING, least, falling[np.minimum(free, len(light))], float(light.sum()))

    def holds_light(self, load: Floats, used: Ints) -> NDArray[np.bool_]:
        """Whether the light experts fit beside heavy ones of `load` in `used` slots: the last axis is the device."""
        return np.asarray(np.minimum(self.limit - load, self.most[used]).sum(axis=-1) * _ROUNDING >= self.light)


def _best_fit(size: Floats, total: Ints, devices: int, room: _Room) -> tuple[Ints, NDArray[np.bool_]]:
    """Each replica on the fullest device that takes it: devices [ways, replicas], and where all found one."""
    ways, most = size.shape
    row = np.arange(ways)
    load, used = np.zeros((ways, devices)), np.zeros((ways, devices), np.int64)
    where, done = np.zeros((ways, most), np.int64), np.ones(ways, dtype=bool)
    last = room.least.shape[1] - 1
    for k in range(most):
        least = np.take_along_axis(room.least, np.minimum(used + 1, last), axis=1)
        can = (used < last) & (load + size[:, k, None] + least <= room.limit)
        device = np.where(can, load, -1.0).argmax(axis=1)
        real = k < total
        done &= ~real | can[row, device]
        on = np.flatnonzero(real & done)
        where[:, k] = device
        load[on, device[on]] += size[on, k]
        used[on, device[on]] += 1
    return where, done & room.holds_light(load, used)


class _Exhaustive:
    """All ways to put replicas of falling `sizes` on devices, as far as they differ, until one fits."""

    def __init__(self, sizes: list[float], devices: int, room: _Room, way: int, budget: _Budget) -> None:
        self.sizes, self.room, self.budget = sizes, room, budget
        self.least = room.least[way].tolist()
        self.load, self.used = [0.0] * devices, [0] * devices
        self.where: list[int] = []
        self.left, self.stopped = _STEPS_A_WAY, False

    def run(self) -> list[int] | None:
        """The device of each replica, or None: there is no way, or (`stopped`) the steps did not suffice."""
        return self.where if self._place(0) else None

    def _go_on(self, steps: int) -> bool:
        self.left -= steps
        self.budget.steps -= steps
        self.stopped = self.left < 0 or self.budget.steps < 0
        return not self.stopped

    def _place(self, k: int) -> bool:
        if k == len(self.sizes):
            self._go_on(_STEPS_A_LOOK)
            return bool(self.room.holds_light(np.array(self.load), np.array(self.used)))
        size = self.sizes[k]
        # Replicas of one size are alike: each goes no further to the left than the one before.
        first = self.where[-1] if k and self.sizes[k - 1] == size else 0
        for device in self._different(first):
            load, used = self.load[device], self.used[device]
            if used + 1 >= len(self.least) or load + size + self.least[used + 1] > self.room.limit:
                continue
            if not self._go_on(1):
                return False
            self.load[device], self.used[device] = load + size, used + 1
            self.where.append(device)
            if self._place(k + 1):
                return True
            self.where.pop()
            self.load[device], self.used[device] = load, used
            if self.stopped:
                return False
        return False

    def _different(self, first: int) -> Iterator[int]:
        """Devices from `first` on, one of those that hold the same."""
        seen = set()
        for device in range(first, len(self.load)):
            state = (self.load[device], self.used[device])
            if state not in seen:
                seen.add(state)
                yield device
