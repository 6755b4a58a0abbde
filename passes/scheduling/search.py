"""Local search for a short makespan: simulated annealing over task orders and modes, with justification.

A state is a task order and a mode for each task; `Placer` turns it into a schedule. Moves shift one task within its
dependencies or change its mode. Schedules are justified right and then left again, which shortens most of them
(Valls, Ballestin and Quintanilla, 2005).
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from moec.passes.scheduling.bounds import heads_and_tails, topological_order
from moec.passes.scheduling.grid import Grid
from moec.passes.scheduling.listing import Placer

_WARM = 0.02
"""First temperature as a share of the makespan: a rise of 2 % is accepted with probability 1/e."""

_MODE_MOVES = 0.35
"""Share of the moves that change a mode, where a task has several."""


_JUSTIFIED = 0.3
"""Share of the promising schedules that are justified: it costs two more placements of all tasks."""


@dataclass(frozen=True)
class Effort:
    """What a search may spend: a moment of `time.monotonic()`, tasks placed, the exact solver's deterministic time.

    Limits of work alone make the answer a function of the input, whatever else the machine is doing.
    """

    deadline: float = math.inf
    placements: float = math.inf
    exact: float = math.inf

    @classmethod
    def within(cls, seconds: float) -> Effort:
        """All that fits in so many seconds from now."""
        return cls(deadline=time.monotonic() + seconds)

    def until(self, seconds: float) -> Effort:
        """The same work, but no longer than so many seconds from now."""
        return replace(self, deadline=time.monotonic() + seconds)

    def share(self, part: float) -> Effort:
        """The first `part` (0 to 1) of what is left of the time, and of all work."""
        now = time.monotonic()
        return Effort(now + part * (self.deadline - now), part * self.placements, part * self.exact)

    def rest(self, part: float) -> Effort:
        """What `share(part)` leaves."""
        return Effort(self.deadline, (1 - part) * self.placements, (1 - part) * self.exact)


@dataclass(frozen=True)
class Found:
    """A grid schedule: start and chosen mode of each task, and the end of the last."""

    starts: list[int]
    choice: list[int]
    length: int


@dataclass(frozen=True)
class Given:
    """A schedule to begin with: the order of the tasks within their dependencies, a grid mode for each, and what goes
    before what, by starts, ends and a period (0: none) in a unit of its own."""

    order: list[int]
    choice: list[int]
    starts: list[int]
    ends: list[int]
    period: int


class LocalSearch:
    """A search that can be run in slices; `best` is the shortest schedule so far, a list schedule at first."""

    def __init__(self, grid: Grid, seed: int = 0, given: Given | None = None) -> None:
        self.grid = grid
        self._random = random.Random(seed)
        self._forward, self._backward = Placer(grid), Placer(grid, reverse=True)
        self._before: list[list[int]] = [[] for _ in range(grid.size)]
        self._after: list[list[int]] = [[] for _ in range(grid.size)]
        for i, j in grid.within():
            self._before[j].append(i)
            self._after[i].append(j)
        self._rank = [0] * grid.size
        for rank, i in enumerate(topological_order(grid.size, grid.within())):
            self._rank[i] = rank
        self._flexible = [i for i in range(grid.size) if len(grid.modes[i]) > 1]
        found = self._constructed()
        if given is not None:
            starts, length = self._forward.place(given.order, given.choice)
            found.append(Found(starts, given.choice, length))
        self.best = min(found, key=lambda found: found.length)

    @property
    def placed(self) -> int:
        """Tasks placed so far: the measure of work that `Effort.placements` limits."""
        return self._forward.placed + self._backward.placed

    def run(self, effort: Effort, goal: Callable[[], int]) -> Found:
        """Search until `best` is no longer than `goal()` or the effort is spent, counted from the search's start."""

        def finished() -> bool:
            if self.best.length <= goal() or self.placed >= effort.placements:
                return True
            return time.monotonic() > effort.deadline

        while self.grid.size > 1 and not finished():
            self._anneal(finished)
        return self.best

    def _anneal(self, finished: Callable[[], bool]) -> None:
        """One descent from the best schedule known, from warm to cold."""
        steps = 40 * self.grid.size
        current, order = self.best, self._by_start(self.best)
        for step in range(steps):
            if finished():
                return
            temperature = max(_WARM * self.best.length * (1 - step / steps) ** 2, 1e-9)
            trial_order, choice = self._neighbour(order, current.choice)
            starts, length = self._forward.place(trial_order, choice)
            if self._random.random() >= math.exp(min((current.length - length) / temperature, 0.0)):
                continue
            current, order = Found(starts, choice, length), trial_order
            if length <= self.best.length * (1 + _WARM) and self._random.random() < _JUSTIFIED:
                current = self._justified(current)
                order = self._by_start(current)
            if current.length < self.best.length:
                self.best = current

    def _neighbour(self, order: list[int], choice: list[int]) -> tuple[list[int], list[int]]:
        """One task elsewhere in the order, or one task in another mode."""
        if self._flexible and self._random.random() < _MODE_MOVES:
            task = self._random.choice(self._flexible)
            others = [k for k in range(len(self.grid.modes[task])) if k != choice[task]]
            changed = choice.copy()
            changed[task] = self._random.choice(others)
            return order, changed
        position = self._random.randrange(len(order))
        task = order[position]
        low = high = position
        before, after = self._before[task], self._after[task]
        while low > 0 and order[low - 1] not in before:
            low -= 1
        while high < len(order) - 1 and order[high + 1] not in after:
            high += 1
        moved = order.copy()
        del moved[position]
        moved.insert(self._random.randint(low, high), task)
        return moved, choice

    def _justified(self, found: Found) -> Found:
        """The schedule pushed to the right, then to the left: never longer."""
        length = [self.grid.modes[i][k].duration for i, k in enumerate(found.choice)]
        latest_first = sorted(
            range(len(length)), key=lambda i: (found.starts[i] + length[i], self._rank[i]), reverse=True
        )
        mirrored, _ = self._backward.place(latest_first, found.choice)
        earliest_first = sorted(range(len(length)), key=lambda i: (-mirrored[i] - length[i], self._rank[i]))
        starts, end = self._forward.place(earliest_first, found.choice)
        return Found(starts, found.choice, end)

    def _by_start(self, found: Found) -> list[int]:
        return sorted(range(len(found.starts)), key=lambda i: (found.starts[i], self._rank[i]))

    def _constructed(self) -> list[Found]:
        """List schedules by longest tail, by latest head and by given order, for two choices of modes."""
        heads, tails = heads_and_tails(self.grid)
        modes = self.grid.modes
        fastest = [0] * len(modes)
        frugal = [min(range(len(m)), key=lambda k: m[k].duration * sum(u for _, u in m[k].uses)) for m in modes]
        found = []
        for choice in (fastest, frugal):
            tail = [tails[i] + modes[i][k].duration for i, k in enumerate(choice)]
            for key in (tail, [-head for head in heads], [-rank for rank in self._rank]):
                order = self._greedy_order(key)
                starts, length = self._forward.place(order, choice)
                found.append(self._justified(Found(starts, choice, length)))
        return found

    def _greedy_order(self, priority: list[int]) -> list[int]:
        """A topological order that takes the ready task of highest priority first."""
        waiting = [len(before) for before in self._before]
        ready = [(-priority[i], i) for i in range(len(waiting)) if not waiting[i]]
        heapq.heapify(ready)
        order = []
        while ready:
            _, i = heapq.heappop(ready)
            order.append(i)
            for j in self._after[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready, (-priority[j], j))
        return order
