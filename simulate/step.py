"""What a pipeline schedule costs: simulated time, bubbles, memory, and the closed formulas beside them.

Formulas: DeepSeek-V3 technical report, arXiv 2412.19437, Table 2. The parts of a step are those that "Insights into
DeepSeek-V3", arXiv 2505.09343, Table 4 lists for the training of DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.simulate.events import Activity, simulate
from moec.simulate.pipeline import Cell, Part, Pipeline
from moec.simulate.trace import Span


@dataclass(frozen=True)
class ChunkTimes:
    """Durations of one micro-batch in one stage, in any unit; answers come in the same one.

    `backward` is the whole backward, `weight` its part for weights, `overlapped` a forward and a backward overlapped
    with each other (F&B).
    """

    forward: float
    backward: float
    weight: float
    overlapped: float

    def of(self, cell: Cell) -> float:
        """Duration of a cell."""
        if len(cell.parts) == 2:
            return self.overlapped
        times = {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}
        return times[cell.parts[0].kind]


def bubble_formula(schedule: str, stages: int, times: ChunkTimes) -> float:
    """Idle time of a rank in one step (Table 2 of the DeepSeek-V3 report)."""
    f, b, w, fb = times.forward, times.backward, times.weight, times.overlapped
    if schedule == "1f1b":
        return (stages - 1) * (f + b)
    if schedule == "zb1p":
        return (stages - 1) * (f + b - 2 * w)
    return (stages / 2 - 1) * (fb + b - 3 * w)


def pipeline_activities(pipe: Pipeline, times: ChunkTimes, send: float = 0.0) -> list[Activity]:
    """The cells of all ranks as activities, a stream a rank; a part waits for those it takes its input from.

    `send` is the time that activations and gradients travel between neighbouring ranks.
    """
    producer = {
        part: (cell_name(rank, cell), rank)
        for rank, cells in enumerate(pipe.programs)
        for cell in cells
        for part in cell.parts
    }
    activities: dict[str, Activity] = {}
    for rank, cells in enumerate(pipe.programs):
        for cell in cells:
            name, after = cell_name(rank, cell), []
            for source, sender in dict.fromkeys(producer[p] for part in cell.parts for p in _inputs(part, producer)):
                carried = f"{source} to {name}"
                if sender != rank and send:
                    activities[carried] = Activity(carried, send, after=(source,), device=_rank(sender))
                after.append(carried if carried in activities else source)
            activities[name] = Activity(name, times.of(cell), _rank(rank), tuple(after), device=_rank(rank))
    return list(activities.values())


def pipeline_timeline(pipe: Pipeline, times: ChunkTimes, send: float = 0.0) -> list[Span]:
    """The simulated step; transfers are on the track "(no stream)"."""
    return simulate(pipeline_activities(pipe, times, send))


@dataclass(frozen=True)
class StepReport:
    """A simulated step, with a value a rank in each list.

    `activations`: most micro-batches whose activations the rank holds at once, in units of one stage; `parts`: time
    spent in F, B (input-only backwards too), W and F&B.
    """

    length: float
    busy: list[float]
    idle: list[float]
    activations: list[int]
    parts: list[dict[str, float]]


def report_step(pipe: Pipeline, spans: Sequence[Span]) -> StepReport:
    """Read a simulated pipeline; `spans` as `pipeline_timeline` or a straggler run of its activities gives them."""
    found = {span.name: span for span in spans}
    length = max(span.start_us + span.us for span in spans) - min(span.start_us for span in spans)
    busy, parts = [], []
    for rank, cells in enumerate(pipe.programs):
        spent = {"F": 0.0, "B": 0.0, "W": 0.0, "F&B": 0.0}
        for cell in cells:
            spent[_kind(cell)] += found[cell_name(rank, cell)].us
        parts.append(spent)
        busy.append(sum(spent.values()))
    held = [peak_activations(cells) for cells in pipe.programs]
    return StepReport(length, busy, [length - b for b in busy], held, parts)


def times_from_parts(pipe: Pipeline, parts: Mapping[str, float]) -> ChunkTimes:
    """The chunk times with which an average rank spends `parts` (keys F, B, W, F&B as in `StepReport.parts`).

    So the measured parts of a step become a pipeline that can be simulated; `pipe` must have all kinds of cells.
    """
    ranks = len(pipe.programs)
    count = {kind: 0.0 for kind in ("F", "B", "I", "W", "F&B")}
    for cells in pipe.programs:
        for cell in cells:
            count["F&B" if len(cell.parts) == 2 else cell.parts[0].kind] += 1 / ranks
    weight = parts["W"] / count["W"]
    backward = (parts["B"] + count["I"] * weight) / (count["B"] + count["I"])
    return ChunkTimes(parts["F"] / count["F"], backward, weight, parts["F&B"] / count["F&B"])


def peak_activations(cells: Sequence[Cell]) -> int:
    """Most micro-batch activations held at once: from the forward to the end of the backward, weights included."""
    held = peak = 0
    for cell in cells:
        held += sum(part.kind == "F" for part in cell.parts)
        peak = max(peak, held)
        held -= sum(part.kind in "BW" for part in cell.parts)
    return peak


def _inputs(part: Part, known: Mapping[Part, object]) -> list[Part]:
    """The parts whose results a part needs from elsewhere or from before."""
    stage, m, d = part.stage, part.micro_batch, part.direction
    if part.kind == "F":
        return [Part("F", stage - 1, m, d)] if stage else []
    if part.kind == "W":
        return [Part("I", stage, m, d)]
    sent_back = (Part("B", stage + 1, m, d), Part("I", stage + 1, m, d))
    return [Part("F", stage, m, d), *(source for source in sent_back if source in known)]


def _kind(cell: Cell) -> str:
    return "F&B" if len(cell.parts) == 2 else cell.parts[0].kind.replace("I", "B")


def cell_name(rank: int, cell: Cell) -> str:
    """What a cell of a rank is called in a timeline."""
    shown = "&".join(
        f"{part.kind}{part.stage}.{part.micro_batch}{'r' if part.direction else ''}" for part in cell.parts
    )
    return f"rank {rank} {shown}"


def _rank(rank: int) -> str:
    return f"rank {rank}"
