"""`moec simulate` on a training plan runs the pipeline that `moec plan` counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.simulate.pipeline import pipeline
from moec.simulate.step import ChunkTimes, pipeline_timeline, report_step
from moec.simulate.training import NoTrainingPlan, read_training

PLAN = {
    "schedule": "dualpipe",
    "layout": {"pp": 4},
    "workload": {"micro_batches": 12},
    "chunk_s": {"F": 1.0, "B": 2.0, "W": 1.0, "F&B": 2.6},
    "send_s": 0.01,
    "parts_s": {"optimiser": 0.5},
}


def test_the_plan_is_run(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    step = read_training(tmp_path / "plan.json")
    spans, report = step.run()
    pipe = pipeline("dualpipe", 4, 12)
    alone = report_step(pipe, pipeline_timeline(pipe, ChunkTimes(1.0, 2.0, 1.0, 2.6), 0.01))
    assert report.length == pytest.approx(1e6 * alone.length)
    assert sum(s.us for s in spans if s.device == "rank 0" and s.track == "rank 0") == pytest.approx(report.busy[0])
    scattered = step.run(0.1, seed=1)[1]
    assert scattered.length > report.length
    assert step.run(0.1, seed=1)[1].length == scattered.length


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"chunk_s": 3}', json.dumps({**PLAN, "layout": {}})])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(NoTrainingPlan, match="not a training plan"):
        read_training(tmp_path / "plan.json")
