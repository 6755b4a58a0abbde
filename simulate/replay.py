"""Run a schedule of `moec overlap` event by event: what remains of it when tasks take longer than planned.

The plan's order is kept, its times are not: a task starts when its dependencies have ended and so have the tasks that
went before it on a resource.
"""

from __future__ import annotations

from moec.passes.scheduling import Schedule, TaskGraph
from moec.simulate.events import Activity, simulate, with_stragglers

_ROUNDING = 1e-9
_DRAWS = 20
_ITERATIONS = 8


def scattered(graph: TaskGraph, schedule: Schedule, spread: float) -> list[float]:
    """What the schedule takes when durations scatter: 20 draws, sorted, in us; see `events.with_stragglers`.

    The makespan, or the interval of a schedule that repeats: the mean over eight iterations once it has filled.
    """
    cyclic = schedule.interval_us is not None
    plan = plan_activities(graph, schedule, _ITERATIONS if cyclic else 1)
    found = []
    for seed in range(_DRAWS):
        spans = simulate(with_stragglers(plan, spread, seed), graph.resources)
        ends = [span.start_us + span.us for span in spans]
        if cyclic:
            # Activities come in the order of their planned starts, so the iteration is read off their names.
            last = [0.0] * _ITERATIONS
            for span, end in zip(spans, ends, strict=True):
                k = int(span.name.rpartition("@")[2])
                last[k] = max(last[k], end)
            found.append((last[-1] - last[0]) / (_ITERATIONS - 1))
        else:
            found.append(max(ends, default=0.0))
    return sorted(found)


def plan_activities(graph: TaskGraph, schedule: Schedule, iterations: int = 1) -> list[Activity]:
    """The activities of a scheduled task graph, with what they use as demand.

    A schedule that repeats is unrolled `iterations` times; the tasks of iteration k are named `name@k`. Simulated with
    the graph's resources as capacities and undisturbed, a plan takes at most the time that it promised.
    """
    period = schedule.interval_us
    repeats = 1 if period is None else iterations
    modes = {task.name: schedule.mode_of(task) for task in graph.tasks}

    def label(name: str, k: int) -> str:
        return name if period is None else f"{name}@{k}"

    runs = sorted(
        (schedule.start_us[name] + k * (period or 0.0), mode.us, name, k)
        for name, mode in modes.items()
        for k in range(repeats)
    )
    after: dict[str, list[str]] = {label(name, k): [] for _, _, name, k in runs}
    for k in range(repeats):
        for before, then in graph.edges:
            after[label(then, k)].append(label(before, k))
        for before, then, distance in graph.repeat:
            if k + distance < repeats and period is not None:
                after[label(then, k + distance)].append(label(before, k))
    slack = _ROUNDING * max((start + us for start, us, _, _ in runs), default=0.0)
    for resource in graph.resources:
        users = [run for run in runs if modes[run[2]].uses.get(resource, 0) > 0 and run[1] > 0]
        for start, _, name, k in users:
            done = [(s + us, s, n, i) for s, us, n, i in users if s + us <= start + slack and (n, i) != (name, k)]
            # The last ones to end suffice: those that ended before one of them began are before it in turn.
            begun = max((s for _, s, _, _ in done), default=0.0)
            after[label(name, k)] += [label(n, i) for end, _, n, i in done if end > begun + slack]
    return [
        Activity(label(name, k), us, after=tuple(dict.fromkeys(after[label(name, k)])), demand=modes[name].uses)
        for _, us, name, k in runs
    ]
