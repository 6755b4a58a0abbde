"""Serial schedule generation: place tasks in a given order, each as early as dependencies and resources allow.

The order and the modes are what the local search varies; some order always leads to an optimal schedule (Kolisch,
1996), so nothing is lost by searching orders.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from moec.passes.scheduling.grid import Grid


class Placer:
    """Places the tasks of a grid. `place(order, choice)` -> start times; `reverse` runs time backwards.

    The amounts of all resources are packed in one integer, a field each with a guard bit that an excess sets: the
    test "does it fit" is one addition and one mask, which makes the search several times faster.
    """

    def __init__(self, grid: Grid, reverse: bool = False) -> None:
        width = [capacity.bit_length() + 2 for capacity in grid.capacities]
        shift = [sum(width[:r]) for r in range(len(width))]
        self._guard = sum(1 << (s + w - 1) for s, w in zip(shift, width, strict=True))
        self._idle = sum(
            ((1 << (w - 1)) - 1 - capacity) << s for s, w, capacity in zip(shift, width, grid.capacities, strict=True)
        )
        self._modes = [
            [(mode.duration, sum(use << shift[r] for r, use in mode.uses)) for mode in modes] for modes in grid.modes
        ]
        self.placed = 0
        """Tasks placed so far: the measure of work."""
        self._before: list[list[int]] = [[] for _ in range(grid.size)]
        for i, j in grid.within():
            if reverse:
                i, j = j, i
            self._before[j].append(i)

    def place(self, order: Sequence[int], choice: Sequence[int]) -> tuple[list[int], int]:
        """Start of each task and the end of the last; `order` respects the dependencies."""
        guard, idle, modes, before = self._guard, self._idle, self._modes, self._before
        starts, ends = [0] * len(modes), [0] * len(modes)
        times, loads = [0], [idle]
        self.placed += len(order)
        for task in order:
            duration, need = modes[task][choice[task]]
            start = max([ends[i] for i in before[task]], default=0)
            if need:
                first = last = bisect_right(times, start) - 1
                end, segments = start + duration, len(times)
                while True:
                    if (loads[last] + need) & guard:
                        first = last = last + 1
                        start = times[first]
                        end = start + duration
                        continue
                    last += 1
                    if last == segments or times[last] >= end:
                        break
                if last == segments or times[last] != end:
                    times.insert(last, end)
                    loads.insert(last, loads[last - 1])
                if times[first] != start:
                    first += 1
                    last += 1
                    times.insert(first, start)
                    loads.insert(first, loads[first - 1])
                for segment in range(first, last):
                    loads[segment] += need
            starts[task] = start
            ends[task] = start + duration
        return starts, max(ends, default=0)
