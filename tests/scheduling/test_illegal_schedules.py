"""A schedule edited by hand into something illegal is refused, with the tasks and the reason."""

from __future__ import annotations

import pytest
from task_graphs import decode_layer

from moec.passes.scheduling import Schedule, TaskGraph, check, graph_from_json, solve
from moec.passes.scheduling.errors import IllegalSchedule

ONCE = graph_from_json(
    {
        "resources": {"sm": 132, "nic": 1},
        "tasks": [
            {"name": "attn", "us": 10, "uses": {"sm": 112}},
            {"name": "dispatch", "us": 6, "uses": {"sm": 20, "nic": 1}},
            {"name": "mlp", "us": 8, "uses": {"sm": 112}},
        ],
        "edges": [["attn", "dispatch"]],
    }
)
LEGAL = {"attn": 0.0, "dispatch": 10.0, "mlp": 10.0}


def refused(graph: TaskGraph, schedule: Schedule) -> IllegalSchedule:
    with pytest.raises(IllegalSchedule) as caught:
        check(graph, schedule)
    return caught.value


def test_the_legal_schedule_passes() -> None:
    check(ONCE, Schedule(LEGAL))


@pytest.mark.parametrize(
    ("edit", "tasks", "reason"),
    [
        ({"dispatch": 9.0}, ["attn", "dispatch"], "'dispatch' starts at 9 us before 'attn' ends at 10 us"),
        ({"mlp": 5.0}, ["attn", "mlp"], "hold 224 of 'sm' together at 5 us, capacity 132"),
        ({"mlp": -1.0}, ["mlp"], "starts at -1 us"),
        ({"mlp": float("nan")}, ["mlp"], "starts at nan us"),
        ({"other": 0.0}, ["other"], "is not a task"),
    ],
)
def test_illegal_times(edit: dict[str, float], tasks: list[str], reason: str) -> None:
    error = refused(ONCE, Schedule({**LEGAL, **edit}))
    assert error.__dict__["tasks"] == tasks
    assert reason in str(error)


def test_a_missing_task_an_unknown_mode_and_a_senseless_interval() -> None:
    assert "'mlp' has no start" in str(refused(ONCE, Schedule({"attn": 0.0, "dispatch": 10.0})))
    assert "has no mode 1" in str(refused(ONCE, Schedule(LEGAL, {"mlp": 1})))
    assert "runs once" in str(refused(ONCE, Schedule(LEGAL, interval_us=30.0)))


def test_iterations_that_collide() -> None:
    """The decode layer's best schedule does not survive a shorter interval."""
    graph = graph_from_json(decode_layer())
    best = solve(graph).schedule
    assert best.interval_us is not None
    check(graph, best)
    error = refused(graph, Schedule(best.start_us, best.mode, best.interval_us - 10))
    assert error.__dict__["tasks"]
    assert "iteration" in str(error)
    assert "needs an interval" in str(refused(graph, Schedule(best.start_us)))


def test_a_capacity_exceeded_only_between_iterations() -> None:
    graph = graph_from_json(
        {
            "resources": {"nic": 1},
            "tasks": [{"name": name, "us": 4, "uses": {"nic": 1}} for name in ("send", "receive")],
            "repeat": [["send", "send", 1]],
        }
    )
    check(graph, Schedule({"send": 0.0, "receive": 4.0}, interval_us=8.0))
    error = refused(graph, Schedule({"send": 0.0, "receive": 4.0}, interval_us=7.0))
    assert error.__dict__["tasks"] == ["receive", "send"]
    assert "of different iterations hold 2 of 'nic'" in str(error)
