"""What a given order of tasks takes: the yardstick that schedules published by others are measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.passes.scheduling.cycles import Arc, maximum_cycle_ratio
from moec.passes.scheduling.graph import TaskGraph


def shortest_interval(graph: TaskGraph, mode: Mapping[str, int], order: Mapping[str, Sequence[str]]) -> float:
    """The least interval (microseconds) of a cyclic graph whose tasks take turns on each resource as `order` says.

    `order` holds for each resource the tasks in the order of one round, which then starts again; a task may be named
    with the iterations that it is behind the others, as `name@1`. Tasks run in the modes given (the first by default).
    """
    index = graph.index
    us = [task.modes[mode.get(task.name, 0)].us for task in graph.tasks]
    arcs: list[Arc] = [(index[a], index[b], us[index[a]], 0) for a, b in graph.edges]
    arcs += [(index[a], index[b], us[index[a]], distance) for a, b, distance in graph.repeat]
    for names in order.values():
        turns = [_turn(name) for name in names]
        for (a, behind), (b, later), round_ends in zip(
            turns, turns[1:] + turns[:1], [False] * (len(turns) - 1) + [True], strict=True
        ):
            arcs.append((index[a], index[b], us[index[a]], behind - later + round_ends))
    return maximum_cycle_ratio(len(us), arcs)


def _turn(name: str) -> tuple[str, int]:
    task, _, behind = name.partition("@")
    return task, int(behind or 0)
