"""Run a schedule of `moec overlap` event by event: what remains of the plan when tasks take longer than planned.

The plan's order is kept, its times are not: a task starts when its dependencies have ended and so have the tasks that
went before it on a resource. Input and output are plain data, the JSON forms of `moec overlap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.errors import InputError
from moec.simulate.events import Activity

_ROUNDING = 1e-9


class NotItsSchedule(InputError):
    """The answer belongs to another task graph."""

    template = "the schedule has no task {name!r}: it was made for another task graph"


def plan_activities(graph: Mapping[str, Any], answer: Mapping[str, Any], iterations: int = 1) -> list[Activity]:
    """The activities of a scheduled task graph, with what they use as demand.

    `graph` is the input of `moec overlap` and `answer` its `--json` output. A graph that repeats is unrolled
    `iterations` times; the tasks of iteration k are named `name@k`. Simulated with the graph's resources as capacities
    and undisturbed, a plan takes at most the time that it promised.
    """
    period = answer["interval_us"]
    repeats = 1 if period is None else iterations
    starts, lengths, uses = answer["start_us"], answer["duration_us"], answer["uses"]
    for task in graph["tasks"]:
        if task["name"] not in starts:
            raise NotItsSchedule(name=task["name"])

    def label(name: str, k: int) -> str:
        return name if period is None else f"{name}@{k}"

    runs = sorted(
        (starts[task["name"]] + k * (period or 0.0), lengths[task["name"]], task["name"], k)
        for task in graph["tasks"]
        for k in range(repeats)
    )
    after: dict[str, list[str]] = {label(name, k): [] for _, _, name, k in runs}
    for k in range(repeats):
        for before, then in graph.get("edges", []):
            after[label(then, k)].append(label(before, k))
        for before, then, distance in graph.get("repeat", []):
            if k + distance < repeats:
                after[label(then, k + distance)].append(label(before, k))
    slack = _ROUNDING * max((start + us for start, us, _, _ in runs), default=0.0)
    for resource in graph.get("resources", {}):
        users = [run for run in runs if uses[run[2]].get(resource, 0) > 0 and run[1] > 0]
        for start, _, name, k in users:
            done = [(s + us, s, n, i) for s, us, n, i in users if s + us <= start + slack and (n, i) != (name, k)]
            # The last ones to end suffice: those that ended before one of them began are before it in turn.
            begun = max((s for _, s, _, _ in done), default=0.0)
            after[label(name, k)] += [label(n, i) for end, _, n, i in done if end > begun + slack]
    return [
        Activity(label(name, k), lengths[name], after=tuple(dict.fromkeys(after[label(name, k)])), demand=uses[name])
        for _, _, name, k in runs
    ]
