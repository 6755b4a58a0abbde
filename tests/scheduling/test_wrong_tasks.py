"""Wrong task graphs: one line that says what is wrong, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moec.errors import InputError
from moec.passes.scheduling import graph_from_json, parse_tasks, read_tasks

A = {"name": "a", "us": 5}
B = {"name": "b", "us": 5, "uses": {"sm": 100}}


def graph(**fields: Any) -> dict[str, Any]:
    return {"resources": {"sm": 132, "nic": 1}, "tasks": [A, B], **fields}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the task graph: expected an object, got []"),
        ({}, "expected a field 'tasks', got none"),
        (graph(tasks={}), "tasks: expected a list"),
        (graph(edge=[]), "unknown field 'edge' (did you mean edges"),
        (graph(tasks=[{**A, "use": {}}]), "tasks[0]: unknown field 'use' (did you mean uses"),
        (graph(tasks=[{"us": 5}]), "tasks[0]: expected a field 'name'"),
        (graph(tasks=[{"name": "a"}]), "task 'a': expected a field 'us', got none"),
        (graph(tasks=[{"name": 3, "us": 1}]), "tasks[0].name: expected a string, got 3"),
        (graph(tasks=[{"name": "a", "us": -1}]), "task 'a', us: expected a duration from 0 to 1e+15 us, got -1"),
        (graph(tasks=[{"name": "a", "us": 1e16}]), "task 'a', us: expected a duration"),
        (graph(tasks=[{"name": "a", "us": True}]), "task 'a', us: expected a finite number, got true"),
        (graph(tasks=[{"name": "a", "us": "5"}]), "task 'a', us: expected a finite number"),
        (graph(tasks=[{"name": "a", "us": float("nan")}]), "task 'a', us: expected a finite number"),
        (graph(tasks=[{"name": "a", "us": 10**400}]), "task 'a', us: expected a finite number"),
        (graph(tasks=[{"name": "a", "us": {}}]), "task 'a', us: expected a number or a table"),
        (graph(tasks=[{"name": "a", "us": {"x": 3}}]), "task 'a', us: expected counts of SMs as keys, got 'x'"),
        (graph(tasks=[{"name": "a", "us": {"64": -3}}]), "task 'a', us: expected a duration"),
        (graph(tasks=[{"name": "a", "us": {"200": 3}}]), "task 'a': uses 200 of 'sm', capacity 132"),
        (graph(resources={"nic": 1}, tasks=[{"name": "a", "us": {"64": 3}}]), "no resource is named 'sm'"),
        (graph(tasks=[A, A]), "tasks: the name 'a' is used twice"),
        (graph(tasks=[{**A, "uses": {"nics": 1}}]), "task 'a': no resource is named 'nics' (did you mean nic"),
        (graph(tasks=[{**A, "uses": {"sm": 133}}]), "task 'a': uses 133 of 'sm', capacity 132"),
        (graph(tasks=[{**A, "uses": {"sm": -1}}]), "task 'a', uses.sm: expected an amount of at least 0, got -1"),
        (graph(tasks=[{**A, "uses": ["sm"]}]), "task 'a', uses: expected an object"),
        (graph(resources={"sm": -1}), "resources.sm: expected a capacity of at least 0, got -1"),
        (graph(resources={"sm": None}), "resources.sm: expected a finite number, got null"),
        (graph(edges=[["a", "bb"]]), "edges[0]: no task is named 'bb' (did you mean b"),
        (graph(edges=[["a"]]), 'edges[0]: expected ["before", "after"], got ["a"]'),
        (graph(edges=[["a", "b"], ["b", "a"]]), "the tasks wait for each other: "),
        (graph(edges=[["a", "a"]]), "the tasks wait for each other: a -> a"),
        (graph(repeat=[["a", "b"]]), 'repeat[0]: expected ["before", "after", iterations later]'),
        (graph(repeat=[["a", "b", 0]]), "repeat[0] (a -> b): expected a distance of at least 1 iteration"),
        (graph(repeat=[["a", "b", -2]]), "repeat[0] (a -> b): expected a distance of at least 1 iteration"),
        (graph(repeat=[["a", "b", 1.5]]), "repeat[0]: expected a whole number of iterations, got 1.5"),
        (graph(repeat=[["a", "c", 1]]), "repeat[0]: no task is named 'c'"),
        (graph(communication=["ib"]), "communication: no resource is named 'ib'"),
        (graph(communication="nic"), "communication: expected a list of resource names"),
    ],
)
def test_wrong_graphs(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        graph_from_json(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cycle_names_its_tasks_in_order() -> None:
    tasks = [{"name": name, "us": 1} for name in "abcd"]
    edges = [["a", "b"], ["b", "c"], ["c", "d"], ["d", "b"]]
    with pytest.raises(InputError) as caught:
        graph_from_json({"tasks": tasks, "edges": edges})
    names = caught.value.__dict__["tasks"]
    assert sorted(names) == ["b", "c", "d"]
    assert all([before, after] in edges for before, after in zip([names[-1], *names], names, strict=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tasks": [}', "tasks.json: line 1, column 12: not JSON"),
        ('{\n "tasks": [],\n}', "tasks.json: line 3, column 1: not JSON"),
        ("", "tasks.json: line 1, column 1: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"tasks": [], "resources": {"sm": 1, "sm": 2}}', "the name 'sm' is used twice"),
        ('{"tasks": [{"name": "a", "us": NaN}]}', "expected a finite number"),
        ('{"tasks": [{"name": "a", "us": %s}]}' % ("9" * 5000), "digits"),
    ],
)
def test_wrong_text(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_tasks(text, "tasks.json")
    assert message in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"tasks": "\xff"}')
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=reason):
            read_tasks(path)
    with pytest.raises(InputError, match="not UTF-8"):
        read_tasks(tmp_path / "latin.json")
