"""Graphs that repeat: least intervals against an integer program, the decode layer, recurrences, degenerate loops."""

from __future__ import annotations

import math
import random
from itertools import combinations, pairwise

import pytest
from exact_oracles import interval_exists
from task_graphs import DECODE_US, Json, decode_layer, random_loop

from moec.passes.scheduling import check, exposed_communication, graph_from_json, solve
from moec.passes.scheduling.bounds import mode_cliques
from moec.passes.scheduling.grid import make_grid


@pytest.mark.parametrize("seed", range(10))
def test_small_loops_reach_the_least_interval(seed: int) -> None:
    data = random_loop(seed, size=3 + seed % 4, longest=7)
    graph = graph_from_json(data)
    solution = solve(graph)
    check(graph, solution.schedule)
    assert solution.interval_us is not None
    assert solution.optimal
    least = math.ceil(solution.interval_us - 1e-6)
    assert interval_exists(data, least)
    assert least == 1 or not interval_exists(data, least - 1)


def test_the_decode_layer_with_one_nic() -> None:
    """Two micro-batches on one NIC: the resource bound of 1100 us is out of reach, 1150 us is the proven best."""
    graph = graph_from_json(decode_layer())
    solution = solve(graph)
    assert solution.bounds["interval_resources"] == 1100
    assert solution.bounds["interval_recurrences"] == 880
    assert solution.interval_us == pytest.approx(1150)
    assert solution.interval_bound_us == pytest.approx(1150)
    assert solution.optimal
    exposed = sum(end - start for start, end in exposed_communication(graph, solution.schedule))
    assert exposed >= 1150 - 740  # two micro-batches compute for 740 us an interval


def test_the_decode_layer_with_a_nic_for_each_batch() -> None:
    solution = solve(graph_from_json(decode_layer(links=2)))
    assert solution.interval_us == pytest.approx(930)
    assert solution.interval_bound_us == pytest.approx(930)
    assert solution.optimal


def test_decode_layers_of_random_durations_are_solved_exactly() -> None:
    draw = random.Random(7)
    for _ in range(2):
        durations = {name: draw.randint(20, 400) for name in DECODE_US}
        graph = graph_from_json(decode_layer(durations=durations))
        solution = solve(graph)
        check(graph, solution.schedule)
        assert solution.optimal


def test_a_recurrence_over_two_iterations_may_leave_half_microseconds() -> None:
    data = {
        "tasks": [{"name": "a", "us": 3}, {"name": "b", "us": 4}],
        "edges": [["a", "b"]],
        "repeat": [["b", "a", 2]],
    }
    solution = solve(graph_from_json(data))
    assert solution.interval_us == pytest.approx(3.5)
    assert solution.bounds["interval_recurrences"] == pytest.approx(3.5)
    assert solution.optimal


def test_a_table_is_chosen_by_the_interval() -> None:
    """Fewer SMs make each product slower, but two fit side by side."""
    tasks = [{"name": name, "us": {"66": 15, "132": 10}} for name in ("a", "b")]
    data = {"resources": {"sm": 132}, "tasks": tasks, "repeat": [["a", "a", 1]]}
    assert solve(graph_from_json(data)).interval_us == pytest.approx(15)


@pytest.mark.parametrize(
    ("data", "interval"),
    [
        ({"tasks": [{"name": "a", "us": 0}], "repeat": [["a", "a", 1]]}, 0),
        ({"tasks": [{"name": "a", "us": 5}], "repeat": [["a", "a", 1]]}, 5),
        ({"tasks": [{"name": "a", "us": 5}, {"name": "b", "us": 2}], "repeat": [["a", "b", 1]]}, 0),
        ({"tasks": [{"name": "a", "us": 1 / 3}], "repeat": [["a", "a", 3]]}, 1 / 9),
        ({"tasks": [{"name": "a", "us": 1e15}], "repeat": [["a", "a", 1]]}, 1e15),
        (
            {
                "resources": {"sm": 132},
                "tasks": [{"name": "long", "us": 1e6}, {"name": "short", "us": 10, "uses": {"sm": 132}}],
                "edges": [["short", "long"]],
                "repeat": [["short", "short", 1]],
            },
            10,
        ),
        (
            {
                "resources": {"sm": 4},
                "tasks": [{"name": "a", "us": 10, "uses": {"sm": 1}}],
                "repeat": [["a", "a", 9]],
            },
            2.5,
        ),
    ],
)
def test_degenerate_loops(data: Json, interval: float) -> None:
    graph = graph_from_json(data)
    solution = solve(graph)
    check(graph, solution.schedule)
    assert solution.interval_us == pytest.approx(interval, rel=1e-9)
    assert solution.optimal


@pytest.mark.parametrize("seed", range(3))
def test_larger_loops_are_legal_and_above_their_bound(seed: int) -> None:
    graph = graph_from_json(random_loop(seed, size=30, longest=300))
    solution = solve(graph, time_limit=1.0)
    check(graph, solution.schedule)
    assert solution.interval_us is not None and solution.interval_bound_us is not None
    assert solution.bounds["interval_resources"] <= solution.interval_bound_us * (1 + 1e-9)
    assert solution.interval_bound_us <= solution.interval_us <= solution.makespan_us * (1 + 1e-9)


def layer_with_divided_sms(seed: int) -> Json:
    """Two micro-batches of computation with tables over SMs, and exchanges that keep some of them."""
    draw = random.Random(seed)
    tasks: list[Json] = []
    for k in "01":
        for name in ("attention", "experts"):
            us = draw.randint(30, 60)
            tasks.append(
                {"name": f"{name}.{k}", "us": {"132": us, "122": us + 4, "112": us + 9}, "uses": {"compute": 1}}
            )
        for name in ("dispatch", "combine"):
            us = draw.randint(20, 50)
            tasks.append({"name": f"{name}.{k}", "us": {"20": us, "10": 2 * us}, "uses": {"nic": 1}})
    chain = ("attention", "dispatch", "experts", "combine")
    return {
        "resources": {"sm": 132, "compute": 1, "nic": 1},
        "tasks": tasks,
        "edges": [[f"{a}.{k}", f"{b}.{k}"] for a, b in pairwise(chain) for k in "01"],
        "repeat": [[f"combine.{k}", f"attention.{k}", 1] for k in "01"],
    }


@pytest.mark.parametrize("seed", range(3))
def test_cliques_of_modes_never_run_side_by_side(seed: int) -> None:
    grid = make_grid(graph_from_json(layer_with_divided_sms(seed)))
    cliques = mode_cliques(grid)
    assert cliques
    for clique in cliques:
        for (i, k), (j, other) in combinations(clique, 2):
            one, two = dict(grid.modes[i][k].uses), dict(grid.modes[j][other].uses)
            fits = all(one.get(r, 0) + two.get(r, 0) <= capacity for r, capacity in enumerate(grid.capacities))
            assert i == j or not fits


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_divide_their_sms_are_proven(seed: int) -> None:
    """Bounds from energies alone stay below: a product cannot hold all SMs for a half and share them for the other."""
    graph = graph_from_json(layer_with_divided_sms(seed))
    solution = solve(graph)
    check(graph, solution.schedule)
    assert solution.optimal
    assert solution.interval_us is not None
    assert max(solution.bounds["interval_resources"], solution.bounds["interval_recurrences"]) < solution.interval_us
