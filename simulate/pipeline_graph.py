"""Whole pipelines as task graphs: what the scheduler finds by itself, beside the schedules that people published.

Memory is a number of micro-batches whose activations a stage may hold. Micro-batches are alike, so that they may be
taken to pass every stage in one order; then "at most n" is an edge: the forward of micro-batch m + n waits for the end
of the backward of micro-batch m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.passes.scheduling import Mode, Schedule, Task, TaskGraph
from moec.simulate.pipeline import Pipeline
from moec.simulate.step import ChunkTimes, cell_name, pipeline_timeline


@dataclass(frozen=True)
class Chain:
    """A way through the pipeline: stage s runs on `ranks[s]` and holds at most `held[s]` micro-batches."""

    ranks: tuple[int, ...]
    micro_batches: int
    held: tuple[int, ...]


def chains_of(pipe: Pipeline) -> list[Chain]:
    """The ways through a published pipeline, one a direction; every stage may hold the most that any holds there."""
    where: dict[tuple[int, int], int] = {}
    count: dict[int, set[int]] = {}
    peak: dict[tuple[int, int], int] = {}
    for rank, cells in enumerate(pipe.programs):
        held: dict[tuple[int, int], int] = {}
        for part in (part for cell in cells for part in cell.parts):
            at = part.direction, part.stage
            where[at] = rank
            count.setdefault(part.direction, set()).add(part.micro_batch)
            held[at] = held.get(at, 0) + (part.kind == "F") - (part.kind in "BW")
            peak[at] = max(peak.get(at, 0), held[at])
    found = []
    for direction, micro_batches in sorted(count.items()):
        ranks = tuple(where[direction, s] for s in range(pipe.stages))
        most = max(peak[direction, s] for s in range(pipe.stages))
        found.append(Chain(ranks, len(micro_batches), (most,) * pipe.stages))
    return found


def pipeline_graph(chains: Sequence[Chain], times: ChunkTimes) -> TaskGraph:
    """Forward, input and weight passes of all micro-batches on ranks that do one thing at a time."""
    lengths = _lengths(times)
    tasks: list[Task] = []
    edges: list[tuple[str, str]] = []

    for c, chain in enumerate(chains):
        last = len(chain.ranks) - 1
        for stage, rank in enumerate(chain.ranks):
            for m in range(chain.micro_batches):
                mine = {kind: _name(kind, c, stage, m) for kind in lengths}
                tasks += [Task(mine[kind], (Mode(us, {f"rank {rank}": 1}),)) for kind, us in lengths.items()]
                edges += [(mine["F"], mine["I"]), (mine["I"], mine["W"])]
                if stage < last:
                    edges.append((mine["F"], _name("F", c, stage + 1, m)))
                    edges.append((_name("I", c, stage + 1, m), mine["I"]))
                if m + 1 < chain.micro_batches:
                    edges += [(mine[kind], _name(kind, c, stage, m + 1)) for kind in lengths]
                if m + chain.held[stage] < chain.micro_batches:
                    edges.append((mine["W"], _name("F", c, stage, m + chain.held[stage])))
    resources = {f"rank {r}": 1.0 for r in sorted({r for chain in chains for r in chain.ranks})}
    return TaskGraph(resources, tuple(tasks), tuple(edges))


def published_schedule(pipe: Pipeline, times: ChunkTimes) -> Schedule:
    """A pipeline as it was published, as a schedule of the tasks of its `pipeline_graph`.

    A forward and a backward that overlap run one after the other, which takes as long where that gains nothing.
    """
    lengths = _lengths(times)
    begin = {span.name: span.start_us for span in pipeline_timeline(pipe, times)}
    start: dict[str, float] = {}
    for rank, cells in enumerate(pipe.programs):
        for cell in cells:
            now = begin[cell_name(rank, cell)]
            for part in cell.parts:
                for kind in {"B": "IW"}.get(part.kind, part.kind):
                    start[_name(kind, part.direction, part.stage, part.micro_batch)] = now
                    now += lengths[kind]
    return Schedule(start)


def _lengths(times: ChunkTimes) -> dict[str, float]:
    return {"F": times.forward, "I": times.backward - times.weight, "W": times.weight}


def _name(kind: str, chain: int, stage: int, m: int) -> str:
    return f"{kind}{stage}.{m}" + "r" * chain
