"""A still picture of a scheduled layer for the report: streams as rows, exposed communication on a row of its own."""

from __future__ import annotations

import math

from moec.passes.scheduling import Task
from moec.passes.streams.layer import STREAMS, LayerSchedule
from moec.simulate.picture import picture
from moec.simulate.program import LINK, exposed
from moec.simulate.trace import Span

_LAYERS = 2
"""Intervals of the steady state that are shown."""


def layer_figure(found: LayerSchedule, title: str) -> str:
    """An SVG element of some layers in the steady state, each task with its place and time as a tooltip."""
    graph, schedule, interval = found.tasks.graph, found.solution.schedule, found.interval_us
    depth = math.ceil(found.solution.makespan_us / interval)

    def span(task: Task, layer: int) -> Span:
        link = graph.communicates(task)
        name = f"{task.name} {layer}"
        start = schedule.start_us[task.name] + layer * interval
        return Span(name, STREAMS[link], start, schedule.mode_of(task).us, args={LINK: 1.0} if link else {})

    spans = [span(task, layer) for layer in range(depth + _LAYERS) for task in graph.tasks]
    return picture(spans + exposed(spans), depth * interval, (depth + _LAYERS) * interval, title)
