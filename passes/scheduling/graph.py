"""The task graph: tasks with alternative modes on renewable resources, dependencies, repetition.

The problem is the multi-mode resource-constrained project scheduling problem (Kolisch and Sprecher, 1997); with
`repeat` edges it is cyclic, as in modulo scheduling (Rau, "Iterative modulo scheduling", 1994).
"""

from __future__ import annotations

import graphlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from moec.errors import near
from moec.passes.scheduling.errors import (
    BadField,
    DependencyCycle,
    DuplicateName,
    OverCapacity,
    UnknownResource,
    UnknownTask,
)

MAX_US = 1e15
"""Longest duration accepted, in microseconds (31 years): float sums stay exact to a nanosecond share of it."""

DIVISIBLE = "sm"
"""The resource whose counts key a table of durations."""

_LINKS = re.compile(
    r"(nv|pcie?|xgmi|if)?-?link|nic|ib|rdma|roce|net(work)?|eth(ernet)?|pcie|nvl|xgmi|scale[-_]?(up|out)"
    r"|comm(unication)?|copy|ce|dma",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run a task: `us` microseconds while holding `uses` (resource -> amount).

    `share` is the count of the divisible resource when the mode comes from a table, else None.
    """

    us: float
    uses: Mapping[str, float] = field(default_factory=dict)
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A task that runs once an iteration, without interruption, in one of its `modes`."""

    name: str
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class TaskGraph:
    """A valid task graph: construction raises the errors of `moec.passes.scheduling.errors`.

    `edges` (a, b): b starts after a has ended, in the same iteration. `repeat` (a, b, n): b of iteration i + n starts
    after a of iteration i has ended; a graph with such edges runs for ever. `communication` names the resources that
    count as links (None: by their names, see `is_link`).
    """

    resources: Mapping[str, float]
    tasks: tuple[Task, ...]
    edges: tuple[tuple[str, str], ...] = ()
    repeat: tuple[tuple[str, str, int], ...] = ()
    communication: frozenset[str] | None = None

    def __post_init__(self) -> None:
        _check_resources(self)
        _check_tasks(self)
        _check_edges(self)
        _check_acyclic(self)

    def __hash__(self) -> int:
        """Graphs can be keys: what is found for one need not be searched again."""
        return hash((tuple((task.name, len(task.modes)) for task in self.tasks), self.edges, self.repeat))

    @property
    def cyclic(self) -> bool:
        """Whether iterations overlap and the interval between them is what counts."""
        return bool(self.repeat)

    @cached_property
    def links(self) -> frozenset[str]:
        """The resources that carry communication."""
        if self.communication is not None:
            return self.communication
        return frozenset(name for name in self.resources if is_link(name))

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each task in `tasks` by name."""
        return {task.name: position for position, task in enumerate(self.tasks)}

    def communicates(self, task: Task) -> bool:
        """Whether any mode of `task` occupies a link."""
        return any(mode.uses.get(link, 0) > 0 for mode in task.modes for link in self.links)


def is_link(resource: str) -> bool:
    """Whether a resource carries communication by its name: nvlink, nic, nic0, ib.send, pcie, rdma, copy_engine ...

    >>> [name for name in ("sm", "hbm", "nic0", "NVLink", "rdma.send", "copy_engine") if is_link(name)]
    ['nic0', 'NVLink', 'rdma.send', 'copy_engine']
    """
    words = re.split(r"[\s._:/-]+|(?<=[a-z])\d+", resource)
    return any(_LINKS.fullmatch(word) for word in (*words, resource) if word)


def _check_resources(graph: TaskGraph) -> None:
    for name, capacity in graph.resources.items():
        if not (math.isfinite(capacity) and capacity >= 0):
            raise BadField(where=f"resources.{name}", expected="a capacity of at least 0", got=f"{capacity:g}")
    for name in sorted(graph.communication or ()):
        if name not in graph.resources:
            raise UnknownResource(where="communication", name=name, hint=near(name, list(graph.resources)))


def _check_tasks(graph: TaskGraph) -> None:
    seen: set[str] = set()
    for task in graph.tasks:
        where = f"task {task.name!r}"
        if task.name in seen:
            raise DuplicateName(where="tasks", name=task.name)
        seen.add(task.name)
        if not task.modes:
            raise BadField(where=where, expected="a duration", got="none")
        for mode in task.modes:
            _check_mode(graph, where, mode)


def _check_mode(graph: TaskGraph, where: str, mode: Mode) -> None:
    if not 0 <= mode.us <= MAX_US:  # also refuses NaN
        raise BadField(where=f"{where}, us", expected=f"a duration from 0 to {MAX_US:g} us", got=f"{mode.us:g}")
    for name, use in mode.uses.items():
        if name not in graph.resources:
            raise UnknownResource(where=where, name=name, hint=near(name, list(graph.resources)))
        if not (math.isfinite(use) and use >= 0):
            raise BadField(where=f"{where}, uses.{name}", expected="an amount of at least 0", got=f"{use:g}")
        if use > graph.resources[name]:
            raise OverCapacity(where=where, use=use, resource=name, capacity=graph.resources[name])


def _check_edges(graph: TaskGraph) -> None:
    names = {task.name for task in graph.tasks}
    numbered = [(f"edges[{i}]", ends) for i, ends in enumerate(graph.edges)]
    numbered += [(f"repeat[{i}]", (a, b)) for i, (a, b, _) in enumerate(graph.repeat)]
    for where, ends in numbered:
        for name in ends:
            if name not in names:
                raise UnknownTask(where=where, name=name, hint=near(name, list(names)))
    for i, (a, b, distance) in enumerate(graph.repeat):
        if distance < 1:
            raise BadField(
                where=f"repeat[{i}] ({a} -> {b})",
                expected="a distance of at least 1 iteration (an edge within one iteration belongs to 'edges')",
                got=str(distance),
            )


def _check_acyclic(graph: TaskGraph) -> None:
    order = graphlib.TopologicalSorter[str]()
    for before, after in graph.edges:
        order.add(after, before)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        names: list[str] = error.args[1]
        raise DependencyCycle(cycle=" -> ".join(names), tasks=names[1:]) from None
