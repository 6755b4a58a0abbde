"""The overlapped cell of DualPipe as a task graph: forward of one micro-batch beside the backward of another.

DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.2.1 and Figure 4: a layer's forward is attention, dispatch,
experts, combine; its backward the same the other way round, split into parts towards inputs and towards weights. The
scheduler gets the parts and what waits for what, and finds the order itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.passes.planning.timing import Line
from moec.passes.scheduling import Mode, Repeating, Solution, Task, TaskGraph, orders, solve
from moec.passes.scheduling.order import shortest_interval
from moec.targets import Target
from moec.targets.cost import op_time

COMPUTE, LINK = "compute", "link"
_EXCHANGES = ("dispatch", "combine")
_FORWARD = (("attn", "dispatch"), ("attn", "shared"), ("dispatch", "mlp"), ("mlp", "combine"), ("combine", "tail"),
            ("shared", "tail"))  # fmt: skip

PUBLISHED = {
    COMPUTE: "mlp.B mlp.W shared.B shared.W mlp.F shared.F attn.B tail.B@-1 attn.W tail.F attn.F@-1",
    LINK: "dispatch.F dispatch.B combine.F combine.B@-1",
}
"""The order of Figure 4; shared experts, which it does not show, beside the routed ones."""


@dataclass(frozen=True)
class CellSchedule(Repeating):
    """A layer of the cell: its graph, the schedule found, and microseconds of the published order."""

    graph: TaskGraph
    solution: Solution
    published_us: float

    @property
    def stretched(self) -> float:
        """The interval over what computation and exchanges take at least, each added up."""
        return max(1.0, self.interval_us / self.solution.bounds["interval_resources"])

    @property
    def order(self) -> Mapping[str, Sequence[str]]:
        """Tasks on the compute and on the link stream by their place in the interval."""
        return orders(self.graph, self.solution.schedule)


def schedule_cell(passes: Mapping[str, Sequence[Line]], busy: Target, hot: Target) -> CellSchedule | None:
    """Schedule a layer's forward beside another one's backward; None without exchanges.

    passes: lines of the layer's function, of the forward (F), the backward towards inputs (B) and weights (W).
    Computation is priced on `busy`, the cores that exchanges leave, and slowed where it shares the memory with them;
    exchanges on `hot`.
    """
    graph = cell_graph(passes, busy, hot)
    if graph is None:
        return None
    published = {
        resource: [word for word in text.split() if word.partition("@")[0] in graph.index]
        for resource, text in PUBLISHED.items()
    }
    return CellSchedule(graph, solve(graph, effort=0.3), shortest_interval(graph, {}, published))


def cell_graph(passes: Mapping[str, Sequence[Line]], busy: Target, hot: Target) -> TaskGraph | None:
    """The tasks of one layer (see `schedule_cell`), repeated from layer to layer; None without exchanges."""
    group = _groups(passes["F"])
    if not group:
        return None
    us: dict[str, float] = {}
    memory: dict[str, float] = {}
    traffic = 0.0
    for kind, lines in passes.items():
        for line in lines:
            name = f"{line.row['op'].removeprefix('moe_') if line.communication else group[line.label]}.{kind}"
            cost = op_time(line.row, hot if line.communication else busy)
            calls = line.calls / passes["F"][0].calls
            us[name] = us.get(name, 0.0) + cost.time_us * calls
            if line.communication:
                traffic += cost.bytes * calls / hot.device.memory_bandwidth * 1e6
            elif cost.bound == "memory":
                memory[name] = memory.get(name, 0.0) + cost.time_us * calls
    computed = sum(time for name, time in us.items() if not name.startswith(_EXCHANGES))
    tasks = tuple(
        Task(name, (Mode(time + memory.get(name, 0.0) * traffic / computed, {_resource(name): 1}),))
        for name, time in us.items()
    )
    edges = [(f"{a}.F", f"{b}.F") for a, b in _FORWARD] + [(f"{b}.B", f"{a}.B") for a, b in _FORWARD]
    edges += [(f"{a}.B", f"{a}.W") for a in ("attn", "shared", "mlp")]
    edges += [(f"{a}.{k}", f"{b}.{k}") for k, a, b in (("F", "attn", "tail"), ("B", "tail", "attn"))]
    repeat = (("tail.F", "attn.F", 1), ("combine.F", "attn.F", 1), ("attn.B", "tail.B", 1), ("attn.B", "combine.B", 1))
    known = tuple((a, b) for a, b in edges if a in us and b in us)
    again = tuple(r for r in repeat if r[0] in us and r[1] in us)
    return TaskGraph({COMPUTE: 1.0, LINK: 1.0}, tasks, known, again, frozenset({LINK}))


def _resource(name: str) -> str:
    return LINK if name.startswith(_EXCHANGES) else COMPUTE


def _groups(forward: Sequence[Line]) -> dict[str, str]:
    """By label: attention up to dispatch, the experts, the shared expert, what follows; empty without exchanges."""
    at = [i for i, line in enumerate(forward) if line.communication]
    if len(at) != 2:
        return {}
    shared = [i for i, line in enumerate(forward) if ".shared" in line.label]
    found: dict[str, str] = {}
    for i, line in enumerate(forward):
        if shared and shared[0] <= i <= shared[-1]:
            found[line.label] = "shared"
        else:
            found[line.label] = "attn" if i < at[0] else "mlp" if i <= at[1] else "tail"
    # What stands beside an exchange carries its label.
    found.update({forward[i].label: "mlp" for i in at})
    return found
