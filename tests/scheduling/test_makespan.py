"""Graphs that run once: optima against an exact solver, bounds, and inputs at the edge of the form."""

from __future__ import annotations

import pytest
from exact_oracles import least_makespan
from task_graphs import Json, random_tasks

from moec.passes.scheduling import check, graph_from_json, orders, solve, utilisation


@pytest.mark.parametrize("seed", range(18))
def test_small_graphs_reach_the_exact_optimum(seed: int) -> None:
    data = random_tasks(seed, size=4 + seed % 7)
    graph = graph_from_json(data)
    solution = solve(graph)
    check(graph, solution.schedule)
    assert solution.makespan_us == pytest.approx(least_makespan(data), rel=1e-9)
    assert solution.optimal
    assert solution.lower_bound_us == solution.makespan_us


@pytest.mark.parametrize(("seed", "size"), [(0, 30), (1, 45), (2, 60)])
def test_larger_graphs_are_legal_and_above_their_bound(seed: int, size: int) -> None:
    graph = graph_from_json(random_tasks(seed, size))
    solution = solve(graph, time_limit=0.5)
    check(graph, solution.schedule)
    simple = max(solution.bounds.values())
    assert simple * (1 - 1e-9) <= solution.lower_bound_us <= solution.makespan_us
    assert solution.optimal == (solution.lower_bound_us == solution.makespan_us)
    assert all(0 < share <= 1 + 1e-9 for share in utilisation(graph, solution.schedule).values())


def test_the_same_graph_gets_the_same_schedule() -> None:
    graph = graph_from_json(random_tasks(5, 14))
    assert solve(graph) == solve(graph)


def test_a_large_graph_without_the_exact_solver() -> None:
    graph = graph_from_json(random_tasks(3, 700))
    solution = solve(graph, time_limit=0.2)
    assert solution.makespan_us >= solution.lower_bound_us > 0


@pytest.mark.parametrize(
    ("data", "makespan"),
    [
        ({"tasks": []}, 0),
        ({"tasks": [{"name": "a", "us": 7.25}]}, 7.25),
        ({"resources": {"sm": 1}, "tasks": [{"name": "a", "us": 0, "uses": {"sm": 1}}]}, 0),
        ({"resources": {"sm": 0}, "tasks": [{"name": "a", "us": 3, "uses": {"sm": 0}}]}, 3),
        ({"tasks": [{"name": "a", "us": 3}, {"name": "b", "us": 4}]}, 4),
        ({"tasks": [{"name": "a", "us": 3}, {"name": "b", "us": 0}, {"name": "c", "us": 4}]}, 4),
        ({"tasks": [{"name": "a", "us": 0.1}, {"name": "b", "us": 0.2}], "edges": [["a", "b"]]}, 0.1 + 0.2),
        ({"tasks": [{"name": "a", "us": 1}], "repeat": []}, 1),
    ],
)
def test_degenerate_graphs(data: Json, makespan: float) -> None:
    solution = solve(graph_from_json(data))
    assert solution.makespan_us == pytest.approx(makespan, rel=1e-12)
    assert solution.optimal
    assert solution.interval_us is None


def test_zero_durations_keep_their_dependencies() -> None:
    data = {
        "resources": {"sm": 1},
        "tasks": [{"name": n, "us": us, "uses": {"sm": 1}} for n, us in (("a", 5), ("mark", 0), ("b", 5))],
        "edges": [["a", "mark"], ["mark", "b"]],
    }
    starts = solve(graph_from_json(data)).schedule.start_us
    assert starts == {"a": 0, "mark": 5, "b": 5}


@pytest.mark.parametrize("scale", [1e-7, 1 / 3, 1e12])
def test_any_scale_of_durations(scale: float) -> None:
    data = random_tasks(4, 8, tables=False)
    expected = least_makespan(data) * scale
    for task in data["tasks"]:
        task["us"] *= scale
    solution = solve(graph_from_json(data))
    assert solution.makespan_us == pytest.approx(expected, rel=1e-7)
    assert solution.optimal


def test_tiny_and_huge_durations_together() -> None:
    tasks = [{"name": f"t{i}", "us": us, "uses": {"sm": 1}} for i, us in enumerate((1e15, 1e-3, 0.7, 1 / 3))]
    solution = solve(graph_from_json({"resources": {"sm": 1}, "tasks": tasks}))
    assert solution.makespan_us == pytest.approx(1e15, rel=1e-12)


def test_shares_of_bandwidth_may_be_decimals() -> None:
    tasks = [{"name": f"t{i}", "us": 10, "uses": {"hbm": 0.1}} for i in range(11)]
    solution = solve(graph_from_json({"resources": {"hbm": 1.0}, "tasks": tasks}))
    assert solution.makespan_us == 20


def test_a_table_trades_sms_for_time() -> None:
    """Alone the product takes all SMs; beside a transfer that needs 24, the faster mode would have to wait."""
    product = {"name": "product", "us": {"108": 130, "132": 110}}
    alone = {"resources": {"sm": 132, "nic": 1}, "tasks": [product]}
    graph = graph_from_json(alone)
    assert graph.tasks[0].modes[solve(graph).schedule.mode["product"]].share == 132

    beside = {**alone, "tasks": [product, {"name": "send", "us": 120, "uses": {"sm": 24, "nic": 1}}]}
    graph = graph_from_json(beside)
    solution = solve(graph)
    assert graph.tasks[0].modes[solution.schedule.mode["product"]].share == 108
    assert solution.makespan_us == 130


def test_counts_above_the_capacity_are_left_out() -> None:
    data = {"resources": {"sm": 78}, "tasks": [{"name": "a", "us": {"64": 20, "78": 17, "132": 10}}]}
    assert solve(graph_from_json(data)).makespan_us == 17


def test_orders_list_each_resource_by_start() -> None:
    graph = graph_from_json(random_tasks(1, 9))
    solution = solve(graph)
    for resource, names in orders(graph, solution.schedule).items():
        starts = [solution.schedule.start_us[name] for name in names]
        assert starts == sorted(starts)
        users = {t.name for t in graph.tasks if solution.schedule.mode_of(t).uses.get(resource)}
        assert set(names) == users
