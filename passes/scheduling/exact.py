"""The makespan problem as a constraint program (OR-tools CP-SAT): proves optima, and improves what a search found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, Generic, TypeVar

from moec.passes.scheduling.bounds import heads_and_tails, mode_cliques, shortest_durations
from moec.passes.scheduling.grid import Grid, GridMode
from moec.passes.scheduling.search import Effort, Found

Answer = TypeVar("Answer")


class Run(Generic[Answer]):
    """A model and one run of the solver on it, which another thread may watch and stop.

    The model is built by the constructor's caller, so that `solve` needs no lock of the interpreter and runs beside
    Python code.
    """

    def __init__(self, cp: Any, read: Callable[[Callable[[Any], int]], Answer]) -> None:
        from ortools.sat.python import cp_model

        self._cp, self._read, self._solver = cp, read, cp_model.CpSolver()
        self._stopped = False
        self.proven: int | None = None
        """The lower bound, once a run has ended with an answer."""
        self.optimal = False
        """Whether the answer meets it."""

    def solve(self, effort: Effort) -> Answer | None:
        """The best answer that the effort suffices for; None when there is none."""
        from ortools.sat.python import cp_model

        solver, seconds = self._solver, effort.deadline - time.monotonic()
        if seconds <= 0 or self._stopped:
            return None
        # One worker, without randomness: what it finds within a deterministic time is reproducible.
        solver.parameters.num_workers = 1
        solver.parameters.max_time_in_seconds = seconds
        solver.parameters.max_deterministic_time = effort.exact
        status = solver.solve(self._cp)
        if status == cp_model.MODEL_INVALID:
            raise ValueError(self._cp.validate())
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        self.proven = math.ceil(solver.best_objective_bound - 1e-6)
        self.optimal = status == cp_model.OPTIMAL
        return self._read(solver.value)

    def stop(self) -> None:
        """End the run soon."""
        self._stopped = True
        self._solver.stop_search()

    def bound(self, known: int) -> int:
        """The better of a known bound and the proven one."""
        return known if self.proven is None else max(known, self.proven)

    def goal(self, known: int) -> int:
        """What a search beside this run has to reach: the proven optimum, until there is one the known bound."""
        return self.bound(known) if self.optimal else known


def beside(run: Run[Answer], effort: Effort, search: Callable[[], bool]) -> Answer | None:
    """The solver's answer, run on a second thread while `search()` works here; a search that wins stops the solver.

    A search that fails waits for the solver's effort to end: which of the two is faster must not decide.
    """
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(run.solve, effort)
        won = True  # an exception in the search ends the solver too
        try:
            won = search()
        finally:
            if won:
                run.stop()
        return answer.result()


def makespan_run(grid: Grid, hint: Found, bound: int) -> Run[Found]:
    """A run that looks for schedules from `bound` to the length of `hint`."""
    from ortools.sat.python import cp_model

    model = _Model(cp_model.CpModel(), grid, hint, bound)
    return Run(model.cp, model.read)


def add_modes(cp: Any, modes: Sequence[GridMode], name: str) -> list[Any]:
    """A literal a mode, exactly one of them true; a constant where there is no choice."""
    if len(modes) == 1:
        return [cp.new_constant(1)]
    literals = [cp.new_bool_var(f"{name}as{k}") for k in range(len(modes))]
    cp.add_exactly_one(literals)
    return literals


def hint_mode(cp: Any, literals: list[Any], choice: int) -> None:
    """Hint the mode of a task that has a choice."""
    if len(literals) > 1:
        for k, literal in enumerate(literals):
            cp.add_hint(literal, k == choice)


def add_capacity(cp: Any, usages: list[tuple[Any, int]], capacity: int) -> None:
    """Intervals with amounts never exceed `capacity`; as disjunctions when no two of them fit side by side."""
    amounts = sorted(use for _, use in usages)
    if len(amounts) > 1 and amounts[0] + amounts[1] > capacity:
        cp.add_no_overlap([interval for interval, _ in usages])
    elif sum(amounts) > capacity:
        cp.add_cumulative([interval for interval, _ in usages], [use for _, use in usages], capacity)


def conflicts(grid: Grid) -> Iterator[tuple[int, int]]:
    """The pairs of tasks that exceed some capacity together, whatever their modes.

    A literal for which of the two goes first says no more than the capacities do, but those are read moment by moment:
    with such literals the solver learns about orders, many times faster and however fine the grid is.
    """
    held = [[min(dict(m.uses).get(r, 0) for m in modes) for r in range(len(grid.capacities))] for modes in grid.modes]
    for i, j in combinations(range(grid.size), 2):
        if any(a + b > capacity for a, b, capacity in zip(held[i], held[j], grid.capacities, strict=True)):
            yield i, j


class _Model:
    """Variables: start and end of each task, a literal a mode, the makespan."""

    def __init__(self, cp: Any, grid: Grid, hint: Found, bound: int) -> None:
        self.cp, self.grid = cp, grid
        heads, tails = heads_and_tails(grid)
        shortest = shortest_durations(grid)
        horizon = hint.length
        self.makespan = cp.new_int_var(bound, horizon, "makespan")
        self.starts, self.ends = [], []
        for i, (head, tail, d) in enumerate(zip(heads, tails, shortest, strict=True)):
            self.starts.append(cp.new_int_var(head, horizon - tail - d, f"start{i}"))
            self.ends.append(cp.new_int_var(head + d, horizon - tail, f"end{i}"))
        self.literals = [add_modes(cp, modes, f"task{i}") for i, modes in enumerate(grid.modes)]
        for i, j in grid.within():
            cp.add(self.starts[j] >= self.ends[i])
        cp.add_max_equality(self.makespan, self.ends)
        self._add_resources()
        for i, j in conflicts(grid):
            turn = cp.new_bool_var(f"turn{i}before{j}")
            cp.add(self.ends[i] <= self.starts[j]).only_enforce_if(turn)
            cp.add(self.ends[j] <= self.starts[i]).only_enforce_if(~turn)
        self._hint(hint)
        cp.minimize(self.makespan)

    def read(self, value: Callable[[Any], int]) -> Found:
        choice = [next(k for k, b in enumerate(literals) if value(b)) for literals in self.literals]
        return Found([value(start) for start in self.starts], choice, value(self.makespan))

    def _add_resources(self) -> None:
        """Capacities, and the energy under the makespan, which alternative intervals hide from the solver."""
        cp, grid = self.cp, self.grid
        usages: list[list[tuple[Any, int]]] = [[] for _ in grid.capacities]
        energies: list[Any] = [0 for _ in grid.capacities]
        for i, modes in enumerate(grid.modes):
            lengths = (m.duration * b for m, b in zip(modes, self.literals[i], strict=True))
            cp.add(self.ends[i] - self.starts[i] == sum(lengths))
            for k, mode in enumerate(modes):
                interval = cp.new_optional_interval_var(
                    self.starts[i], mode.duration, self.ends[i], self.literals[i][k], f"task{i}in{k}"
                )
                for resource, use in mode.uses:
                    usages[resource].append((interval, use))
                    energies[resource] += mode.duration * use * self.literals[i][k]
        for resource, capacity in enumerate(grid.capacities):
            add_capacity(cp, usages[resource], capacity)
            cp.add(energies[resource] <= capacity * self.makespan)
        for clique in mode_cliques(grid):
            cp.add(sum(grid.modes[i][k].duration * self.literals[i][k] for i, k in clique) <= self.makespan)

    def _hint(self, found: Found) -> None:
        for i, start in enumerate(found.starts):
            self.cp.add_hint(self.starts[i], start)
            self.cp.add_hint(self.ends[i], start + self.grid.modes[i][found.choice[i]].duration)
            hint_mode(self.cp, self.literals[i], found.choice[i])
        self.cp.add_hint(self.makespan, found.length)
