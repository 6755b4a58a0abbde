"""Pipeline-parallel training schedules as programs for each rank: 1F1B, ZB1P, DualPipe and DualPipeV.

1F1B: Narayanan et al., arXiv 2104.04473. ZB1P: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241
(schedule H1). DualPipe and DualPipeV: DeepSeek-V3 technical report, arXiv 2412.19437, sec. 3.2.1 and Table 2, and the
eight phases of deepseek-ai/DualPipe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from moec.errors import InputError

Kind = Literal["F", "B", "I", "W"]
"""Forward, full backward, backward for inputs, backward for weights."""

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")


class BadPipeline(InputError):
    """Stages or micro-batches that the schedule is not defined for."""

    template = "{schedule} with {stages} stages and {micro_batches} micro-batches: needs {need}"


@dataclass(frozen=True)
class Part:
    """One pass of a micro-batch through a stage of the model.

    `direction` tells the micro-batches apart that enter a pipeline at its first rank (0) and at its last (1).
    """

    kind: Kind
    stage: int
    micro_batch: int
    direction: int = 0


@dataclass(frozen=True)
class Cell:
    """What a rank does at once: one part, or a forward and a backward overlapped with each other."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Pipeline:
    """`programs[rank]` is the order of the cells; `stages` counts those that a micro-batch passes."""

    schedule: str
    stages: int
    micro_batches: int
    programs: tuple[tuple[Cell, ...], ...]

    @property
    def copies(self) -> int:
        """Stages whose parameters a rank holds."""
        return max(len({part.stage for cell in cells for part in cell.parts}) for cells in self.programs)


def pipeline(schedule: str, stages: int, micro_batches: int) -> Pipeline:
    """One of SCHEDULES over `stages` stages; raises BadPipeline.

    DualPipe sends half of the micro-batches in from each end and keeps two stages on each of `stages` ranks; DualPipeV
    folds the pipeline over stages / 2 ranks.
    """
    if schedule not in SCHEDULES:
        raise BadPipeline(
            schedule=schedule, stages=stages, micro_batches=micro_batches, need=f"one of {', '.join(SCHEDULES)}"
        )
    _check(schedule, stages, micro_batches)
    if schedule == "1f1b":
        programs = [_one_forward_one_backward(stages, rank, micro_batches) for rank in range(stages)]
    elif schedule == "zb1p":
        programs = [_zero_bubble(stages, rank, micro_batches) for rank in range(stages)]
    elif schedule == "dualpipe":
        programs = [_dual(stages, rank, micro_batches // 2, False) for rank in range(stages)]
    else:
        programs = [_dual(stages, rank, micro_batches, True) for rank in range(stages // 2)]
    return Pipeline(schedule, stages, micro_batches, tuple(programs))


def _check(schedule: str, stages: int, micro_batches: int) -> None:
    need = ""
    if stages < 1 or micro_batches < 1:
        need = "at least one of each"
    elif schedule == "dualpipe" and (stages % 2 or micro_batches % 2 or micro_batches < 2 * stages):
        need = "even numbers, and at least twice as many micro-batches as stages"
    elif schedule == "dualpipev" and (stages % 2 or micro_batches < stages):
        need = "an even number of stages, and at least as many micro-batches"
    if need:
        raise BadPipeline(schedule=schedule, stages=stages, micro_batches=micro_batches, need=need)


def _one_forward_one_backward(stages: int, rank: int, micro_batches: int) -> tuple[Cell, ...]:
    ahead = min(stages - rank, micro_batches)
    cells = [_cell("F", rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        cells.append(_cell("B", rank, m))
        if m + ahead < micro_batches:
            cells.append(_cell("F", rank, m + ahead))
    return tuple(cells)


def _zero_bubble(stages: int, rank: int, micro_batches: int) -> tuple[Cell, ...]:
    """Weights lag by the rank: later ranks have room for it in memory, and use it to send gradients back sooner."""
    ahead = min(stages - rank, micro_batches)
    cells = [_cell("F", rank, m) for m in range(ahead)]
    for m in range(micro_batches):
        cells.append(_cell("I", rank, m))
        if m >= rank:
            cells.append(_cell("W", rank, m - rank))
        if m + ahead < micro_batches:
            cells.append(_cell("F", rank, m + ahead))
    cells += [_cell("W", rank, m) for m in range(max(micro_batches - rank, 0), micro_batches)]
    return tuple(cells)


def _cell(kind: Kind, stage: int, micro_batch: int) -> Cell:
    return Cell((Part(kind, stage, micro_batch),))


@dataclass
class _Lanes:
    """The two stages of a DualPipe rank: lane 0 near the end where its micro-batches enter, lane 1 far from it."""

    stage: tuple[int, int]
    direction: tuple[int, int]
    cells: list[Cell] = field(default_factory=list)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    weights: deque[Part] = field(default_factory=deque)

    def forward(self, lane: int) -> None:
        self.cells.append(Cell((self._forward(lane),)))

    def backward(self, lane: int, split: bool = False) -> None:
        part = self._part("I" if split else "B", lane, self.backwards)
        if split:
            self.weights.append(Part("W", part.stage, part.micro_batch, part.direction))
        self.cells.append(Cell((part,)))

    def weight(self) -> None:
        self.cells.append(Cell((self.weights.popleft(),)))

    def both(self, forward: int, backward: int) -> None:
        self.cells.append(Cell((self._forward(forward), self._part("B", backward, self.backwards))))

    def _forward(self, lane: int) -> Part:
        return self._part("F", lane, self.forwards)

    def _part(self, kind: Kind, lane: int, count: list[int]) -> Part:
        count[lane] += 1
        return Part(kind, self.stage[lane], count[lane] - 1, self.direction[lane])


def _dual(stages: int, rank: int, per_lane: int, folded: bool) -> tuple[Cell, ...]:
    """The eight phases of a rank: fill near, fill both, turn, overlap, drain far, drain both, drain near, weights."""
    near = min(rank, stages - 1 - rank)
    mirrored = rank != near
    direction = (0, 0) if folded else (int(mirrored), int(not mirrored))
    lanes = _Lanes((near, stages - 1 - near), direction)
    inner = stages // 2 - 1 - near
    for _ in range(2 * inner):
        lanes.forward(0)
    for _ in range(near + 1):
        lanes.forward(0)
        lanes.forward(1)
    for _ in range(inner):
        lanes.backward(1, split=True)
        lanes.weight()
        lanes.forward(1)
    for k in range(per_lane - stages + near + 1):
        if k == 0 and inner == 0:  # the two middle ranks wait for each other: an overlapped cell would start later
            lanes.forward(0)
            lanes.backward(1)
        else:
            lanes.both(0, 1)
        lanes.both(1, 0)
    for _ in range(inner):
        lanes.backward(1)
        lanes.both(1, 0)
    for lane, split in _drain_both(near):
        lanes.backward(lane, split)
    for _ in range(inner):
        lanes.weight()
        lanes.backward(0, split=True)
    while lanes.weights:
        lanes.weight()
    return tuple(lanes.cells)


def _drain_both(near: int) -> Iterator[tuple[int, bool]]:
    """Lanes by turns; weights are split off in the second half of the backwards, to fill what follows."""
    count = 2 * (near + 1)
    first_split = near + 1
    for k in range(count):
        yield 1 - k % 2, k >= first_split
