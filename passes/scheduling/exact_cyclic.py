"""The least initiation interval as a constraint program: phases on a circle of variable length, stages beside them.

Task i starts at phase_i + stage_i * interval. With the lap count of a dependency, K = stage_j - stage_i + distance, it
reads phase_j + K * interval >= phase_i + duration_i: linear for each value of K, and of no force beyond a few. So the
interval is a variable, and the solver proves its bound directly. Periodic schedules stay feasible under a growing
interval, so the least interval on the grid lies less than one unit above the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moec.passes.scheduling.bounds import mode_cliques
from moec.passes.scheduling.exact import Run, add_capacity, add_modes, conflicts, hint_mode
from moec.passes.scheduling.grid import Grid

_MODEL_LIMIT = 20_000
"""Intervals and laps beyond which the model is not built: it would not be searched in the time of a compiler."""


@dataclass(frozen=True)
class Periodic:
    """A periodic grid schedule: start and mode of each task in iteration 0, and the interval between iterations."""

    starts: list[int]
    choice: list[int]
    interval: int


def interval_run(grid: Grid, hint: Periodic, bound: int) -> Run[Periodic] | None:
    """A run that looks for the least interval from `bound` (above 0) to that of `hint`; None: too large a model."""
    if _model_size(grid, bound, len(grid.arcs)) > _MODEL_LIMIT:
        return None
    from ortools.sat.python import cp_model

    model = _Model(cp_model.CpModel(), grid, bound, hint)
    for i, j, distance in grid.arcs:
        model.add_lapped_arc(i, j, distance)
    model.cp.minimize(model.interval)
    return Run(model.cp, model.read)


def span_run(grid: Grid, hint: Periodic) -> Run[Periodic] | None:
    """A run that keeps the interval of `hint` and makes one iteration, first start to last end, short."""
    if _model_size(grid, hint.interval) > _MODEL_LIMIT:
        return None
    from ortools.sat.python import cp_model

    model = _Model(cp_model.CpModel(), grid, hint.interval, hint)
    for i, j, distance in grid.arcs:
        lead = distance * hint.interval
        model.cp.add(model.start(j) + lead >= model.start(i) + model.durations[i])
    longest = max(mode.duration for modes in grid.modes for mode in modes)
    last = model.cp.new_int_var(0, max(hint.starts) + longest + 2 * hint.interval, "last end")
    for i in range(grid.size):
        model.cp.add(last >= model.start(i) + model.durations[i])
    model.cp.minimize(last)
    return Run(model.cp, model.read)


def _model_size(grid: Grid, interval: int, lapped: int = 0) -> int:
    """Intervals of the model, and laps of its first `lapped` arcs."""
    laps = [math.ceil(max(m.duration for m in modes) / interval) + 1 for modes in grid.modes]
    held = sum(laps[i] * len(modes) for i, modes in enumerate(grid.modes) if any(m.uses for m in modes))
    return held + sum(laps[i] for i, _, _ in grid.arcs[:lapped])


class _Model:
    """Variables: the interval from `low` to that of `hint`; a phase, a stage and mode literals for each task."""

    def __init__(self, cp: Any, grid: Grid, low: int, hint: Periodic) -> None:
        self.cp, self.grid, self.low, self.high = cp, grid, low, hint.interval
        self.interval = cp.new_int_var(low, self.high, "interval")
        self.phases = [cp.new_int_var(0, self.high, f"phase{i}") for i in range(grid.size)]
        longest = [max(mode.duration for mode in modes) for modes in grid.modes]
        stages = sum(self._free_lap(d) for d in longest) + max(hint.starts, default=0) // low + 1
        self.stages = [cp.new_int_var(0, stages, f"stage{i}") for i in range(grid.size)]
        self.literals = [add_modes(cp, modes, f"task{i}") for i, modes in enumerate(grid.modes)]
        self.durations = [
            sum(m.duration * b for m, b in zip(modes, literals, strict=True))
            for modes, literals in zip(grid.modes, self.literals, strict=True)
        ]
        self._add_resources(longest)
        self._add_turns()
        self._hint(hint)

    def start(self, i: int) -> Any:
        """Start of a task in iteration 0, where the interval is fixed."""
        return self.phases[i] + self.high * self.stages[i]

    def add_lapped_arc(self, i: int, j: int, distance: int) -> None:
        """Task j waits for task i: a literal says that the lap count is at most v, for each v that matters."""
        cp, modes = self.cp, self.grid.modes[i]
        lap = self.stages[j] - self.stages[i] + distance
        least = math.ceil(min(m.duration for m in modes) / self.high) - 1
        free = self._free_lap(max(m.duration for m in modes))
        cp.add(lap >= least)
        for v in range(least, free):
            tight = cp.new_bool_var(f"lap{i}to{j}at{v}")
            cp.add(lap <= v).only_enforce_if(tight)
            cp.add(lap > v).only_enforce_if(~tight)
            cp.add(self.phases[j] + v * self.interval >= self.phases[i] + self.durations[i]).only_enforce_if(tight)

    def read(self, value: Callable[[Any], int]) -> Periodic:
        interval = value(self.interval)
        starts = [value(phase) + interval * value(s) for phase, s in zip(self.phases, self.stages, strict=True)]
        choice = [next(k for k, b in enumerate(literals) if value(b)) for literals in self.literals]
        return Periodic(starts, choice, interval)

    def _free_lap(self, duration: int) -> int:
        """The lap count from which on a dependency of this duration always holds."""
        return math.ceil(duration / self.low) + 1

    def _add_resources(self, longest: list[int]) -> None:
        """On the circle, a task that runs past the end of the interval is also there one interval earlier."""
        cp, grid = self.cp, self.grid
        usages: list[list[tuple[Any, int]]] = [[] for _ in grid.capacities]
        energies: list[Any] = [0 for _ in grid.capacities]
        for i, modes in enumerate(grid.modes):
            cp.add(self.phases[i] <= self.interval)
            for literal, mode in zip(self.literals[i], modes, strict=True):
                for resource, use in mode.uses:
                    energies[resource] += mode.duration * use * literal
            if not any(mode.uses for mode in modes):
                continue
            for lap in range(math.ceil(longest[i] / self.low) + 1):
                start = cp.new_int_var(-lap * self.high, self.high, f"start{i}lap{lap}")
                cp.add(start == self.phases[i] - lap * self.interval)
                for k, mode in enumerate(modes):
                    shown = cp.new_optional_fixed_size_interval_var(
                        start, mode.duration, self.literals[i][k], f"task{i}lap{lap}as{k}"
                    )
                    for resource, use in mode.uses:
                        usages[resource].append((shown, use))
        for resource, capacity in enumerate(grid.capacities):
            add_capacity(cp, usages[resource], capacity)
            cp.add(energies[resource] <= capacity * self.interval)
        for clique in mode_cliques(grid):
            cp.add(sum(grid.modes[i][k].duration * self.literals[i][k] for i, k in clique) <= self.interval)

    def _add_turns(self) -> None:
        """Two tasks that never run side by side take turns on the circle (see `conflicts`)."""
        for i, j in conflicts(self.grid):
            turn = self.cp.new_bool_var(f"turn{i}before{j}")
            for first, then, literal in ((i, j, turn), (j, i, ~turn)):
                gap = self.phases[then] - self.phases[first]
                self.cp.add(gap >= self.durations[first]).only_enforce_if(literal)
                self.cp.add(gap <= self.interval - self.durations[then]).only_enforce_if(literal)

    def _hint(self, hint: Periodic) -> None:
        """Hint the schedule, turned so that one task has phase 0: the circle has no beginning of its own."""
        users = [i for i, modes in enumerate(self.grid.modes) if any(mode.uses for mode in modes)]
        anchor = max(users, key=lambda i: self.grid.modes[i][0].duration, default=0)
        self.cp.add(self.phases[anchor] == 0)
        turned = [start - hint.starts[anchor] for start in hint.starts]
        first = min(start // self.high for start in turned)
        self.cp.add_hint(self.interval, self.high)
        for i, start in enumerate(turned):
            self.cp.add_hint(self.phases[i], start % self.high)
            self.cp.add_hint(self.stages[i], start // self.high - first)
            hint_mode(self.cp, self.literals[i], hint.choice[i])
