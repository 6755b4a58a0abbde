"""Oracles for schedules: plain textbook models for CP-SAT and HiGHS, without any of moec's bounds or hints."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint, milp
from task_graphs import Json, modes


def least_makespan(graph: Json) -> int:
    """The optimum of a graph that runs once, with whole durations."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    horizon = sum(max(us for us, _ in modes(task)) for task in graph["tasks"])
    held: dict[str, list[tuple[Any, int]]] = {name: [] for name in graph["resources"]}
    starts, ends = {}, {}
    for task in graph["tasks"]:
        name = task["name"]
        starts[name] = model.new_int_var(0, horizon, "")
        ends[name] = model.new_int_var(0, horizon, "")
        taken = [model.new_bool_var("") for _ in modes(task)]
        model.add_exactly_one(taken)
        for literal, (us, uses) in zip(taken, modes(task), strict=True):
            interval = model.new_optional_interval_var(starts[name], us, ends[name], literal, "")
            for resource, amount in uses.items():
                held[resource].append((interval, amount))
    for before, after in graph["edges"]:
        model.add(starts[after] >= ends[before])
    for resource, capacity in graph["resources"].items():
        model.add_cumulative([i for i, _ in held[resource]], [a for _, a in held[resource]], capacity)
    makespan = model.new_int_var(0, horizon, "")
    model.add_max_equality(makespan, list(ends.values()))
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    makespan_us: int = round(solver.objective_value)
    return makespan_us


def interval_exists(graph: Json, interval: int) -> bool:
    """Whether a graph that repeats has a schedule of this whole interval: the time-indexed integer program of
    Eichenberger and Davidson (1997), x[i, t] = 1 when task i starts at t modulo the interval, and a stage for each."""
    tasks, laps = graph["tasks"], len(graph["tasks"]) + 2
    index = {task["name"]: i for i, task in enumerate(tasks)}
    size = len(tasks) * (interval + 1)
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def add(row: np.ndarray, least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    def start(i: int) -> np.ndarray:
        row = np.zeros(size)
        row[i * (interval + 1) : i * (interval + 1) + interval] = np.arange(interval)
        row[i * (interval + 1) + interval] = interval
        return row

    for i in range(len(tasks)):
        row = np.zeros(size)
        row[i * (interval + 1) : i * (interval + 1) + interval] = 1
        add(row, 1, 1)
    for before, after, distance in [*((a, b, 0) for a, b in graph["edges"]), *graph["repeat"]]:
        i, j = index[before], index[after]
        add(start(j) - start(i), tasks[i]["us"] - distance * interval, np.inf)
    for resource, capacity in graph["resources"].items():
        for moment in range(interval):
            row = np.zeros(size)
            for i, task in enumerate(tasks):
                for age in range(task["us"]):
                    row[i * (interval + 1) + (moment - age) % interval] += task["uses"].get(resource, 0)
            add(row, -np.inf, capacity)
    upper = np.ones(size)
    upper[interval :: interval + 1] = laps
    answer = milp(
        np.zeros(size),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(size),
        bounds=(np.zeros(size), upper),
    )
    assert answer.status in (0, 2), answer.message
    return bool(answer.status == 0)
