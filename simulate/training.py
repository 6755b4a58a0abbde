"""The pipeline of a training step from the plan that `moec plan --phase train --json` prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import InputError
from moec.simulate.events import simulate, with_stragglers
from moec.simulate.pipeline import Pipeline, pipeline
from moec.simulate.step import ChunkTimes, StepReport, bubble_formula, pipeline_activities, report_step
from moec.simulate.trace import Span


class NoTrainingPlan(InputError):
    """A JSON file that is not a training plan."""

    template = "{path}: not a training plan ({reason}); write one with moec plan MODEL --target T --phase train --json"


@dataclass(frozen=True)
class TrainingRun:
    """A pipeline with the times of its chunks and of sends between its stages, in microseconds."""

    pipe: Pipeline
    times: ChunkTimes
    send_us: float
    optimiser_us: float

    @property
    def formula_us(self) -> float:
        """The bubble of Table 2 of the DeepSeek-V3 report."""
        return bubble_formula(self.pipe.schedule, self.pipe.stages, self.times)

    def run(self, spread: float = 0.0, seed: int = 0) -> tuple[list[Span], StepReport]:
        """The timeline of all ranks and what they do; spread: see `events.with_stragglers`."""
        activities = pipeline_activities(self.pipe, self.times, self.send_us)
        spans = simulate(with_stragglers(activities, spread, seed) if spread else activities)
        return spans, report_step(self.pipe, spans)


def read_training(path: str | Path) -> TrainingRun:
    """Read a plan; raises NoTrainingPlan and what `pipeline` raises."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NoTrainingPlan(path=path, reason=(error.strerror or "cannot be read").lower()) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NoTrainingPlan(path=path, reason=str(error).partition("\n")[0]) from None
    try:
        return _of(data)
    except (KeyError, TypeError) as error:
        raise NoTrainingPlan(
            path=path, reason=f"no field {error}" if isinstance(error, KeyError) else "wrong form"
        ) from None


def _of(data: Any) -> TrainingRun:
    chunk = {kind: 1e6 * float(data["chunk_s"][kind]) for kind in ("F", "B", "W", "F&B")}
    schedule = str(data["schedule"])
    stages = int(data["layout"]["pp"]) * (2 if schedule == "dualpipev" else 1)
    pipe = pipeline(schedule, stages, int(data["workload"]["micro_batches"]))
    times = ChunkTimes(chunk["F"], chunk["B"], chunk["W"], chunk["F&B"])
    return TrainingRun(pipe, times, 1e6 * float(data["send_s"]), 1e6 * float(data["parts_s"]["optimiser"]))
