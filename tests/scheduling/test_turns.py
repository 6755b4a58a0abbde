"""Schedules by turns: valid for the whole graph, never below its least interval, and found where parts are alike."""

from __future__ import annotations

import pytest
from task_graphs import decode_layer

from moec.passes.scheduling import check, graph_from_json, solve
from moec.passes.scheduling.turns import better, by_turns


@pytest.mark.parametrize(("links", "least"), [(1, 1150), (2, 930)])
def test_turns_of_the_decode_layer(links: int, least: int) -> None:
    graph = graph_from_json(decode_layer(links))
    turns = by_turns(graph)
    assert turns is not None and turns.interval_us is not None
    check(graph, turns.schedule)
    assert turns.interval_us >= least
    found = better(turns, solve(graph))
    assert found.interval_us == pytest.approx(least) and found.optimal


def test_parts_that_differ_take_no_turns() -> None:
    data = decode_layer(1)
    data["tasks"][0]["us"] += 1
    assert by_turns(graph_from_json(data)) is None
    data = decode_layer(1)
    data["edges"].append(["attn0.0", "attn0.1"])
    assert by_turns(graph_from_json(data)) is None
    assert by_turns(graph_from_json({"resources": {"sm": 1}, "tasks": [{"name": "a", "us": 1}]})) is None
