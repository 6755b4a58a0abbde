"""A schedule given to begin with: what is found is never longer, and an illegal one is refused."""

from __future__ import annotations

import pytest
from task_graphs import decode_layer, random_loop, random_tasks

from moec.passes.scheduling import check, graph_from_json, solve
from moec.passes.scheduling.errors import IllegalSchedule
from moec.passes.scheduling.schedule import Schedule


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_is_no_longer_than_what_was_given(seed: int) -> None:
    """Hardly any search of its own, from the answer of a long one; durations with many digits too."""
    for data in (random_tasks(seed, 25), random_loop(seed, 14, 90)):
        for task in data["tasks"]:
            if seed % 2 and isinstance(task["us"], int):
                task["us"] /= 7
        graph = graph_from_json(data)
        given = solve(graph, effort=0.3)
        found = solve(graph, effort=0.001, seed=1, start=given.schedule)
        check(graph, found.schedule)
        assert found.makespan_us <= given.makespan_us * (1 + 1e-12) or graph.cyclic
        assert (found.interval_us or 0.0) <= (given.interval_us or 0.0) * (1 + 1e-12)


def test_modes_that_the_grid_does_without() -> None:
    """A schedule may use a mode that another one dominates: it is read with that one."""
    table, nothing = {"us": {"60": 7.3, "132": 7.3}}, {"us": {"132": 0, "60": 0}}
    tasks = [{"name": "a", **table}, {"name": "b", **table}, {"name": "c", **nothing}]
    graph = graph_from_json({"resources": {"sm": 132}, "tasks": tasks, "repeat": [["a", "b", 1]]})
    slow = Schedule({"a": 0.0, "b": 7.3, "c": 3.0}, {"a": 1, "b": 1, "c": 1}, 14.6)
    assert solve(graph, effort=0.001, start=slow).interval_us == pytest.approx(7.3)


def test_a_better_one_is_still_found() -> None:
    """The published order of the decode layer takes 1280 us; from one that is worse still the search gets to 1150."""
    graph = graph_from_json(decode_layer())
    start, now = {}, 0.0
    for batch in "01":
        for name in ("attn0", "attn1", "shared", "dispatch", "mlp", "combine"):
            start[f"{name}.{batch}"] = now
            now += next(t.modes[0].us for t in graph.tasks if t.name == f"{name}.{batch}")
    one_by_one = Schedule(start, interval_us=now)
    assert solve(graph, start=one_by_one).interval_us == pytest.approx(1150)


def test_an_illegal_one_is_refused() -> None:
    graph = graph_from_json(decode_layer())
    with pytest.raises(IllegalSchedule, match="starts at 0 us before"):
        solve(graph, start=Schedule({t.name: 0.0 for t in graph.tasks}, interval_us=2000.0))
