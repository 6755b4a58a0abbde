"""Pipeline schedules against the formulas and figures that DeepSeek published."""

from __future__ import annotations

import pytest

from moec.simulate.pipeline import SCHEDULES, BadPipeline, pipeline
from moec.simulate.step import (
    ChunkTimes,
    bubble_formula,
    pipeline_activities,
    pipeline_timeline,
    report_step,
    times_from_parts,
)

SIZES = [(4, 12), (8, 24), (16, 60)]
UNEQUAL = ChunkTimes(forward=1.3, backward=2.7, weight=0.9, overlapped=3.5)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_single_pipelines_idle_as_the_formula_says(schedule: str, stages: int, micro_batches: int) -> None:
    pipe = pipeline(schedule, stages, micro_batches)
    step = report_step(pipe, pipeline_timeline(pipe, UNEQUAL))
    assert step.idle == pytest.approx([bubble_formula(schedule, stages, UNEQUAL)] * stages)


@pytest.mark.parametrize("overlapped", [2.0, 2.6, 3.0])
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_dual_pipelines_idle_as_the_formula_says(
    schedule: str, stages: int, micro_batches: int, overlapped: float
) -> None:
    """With forward, input and weight passes of one length, the middle ranks idle for exactly the published bubble."""
    times = ChunkTimes(1.0, 2.0, 1.0, overlapped)
    pipe = pipeline(schedule, stages, micro_batches)
    step = report_step(pipe, pipeline_timeline(pipe, times))
    middle = stages // 2 - 1
    assert step.idle[middle] == pytest.approx(bubble_formula(schedule, stages, times))
    assert max(step.idle) == pytest.approx(step.idle[middle])


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_dual_pipelines_with_short_weights_stay_below_the_formula(schedule: str) -> None:
    pipe = pipeline(schedule, 16, 60)
    step = report_step(pipe, pipeline_timeline(pipe, UNEQUAL))
    assert 0 < max(step.idle) <= bubble_formula(schedule, 16, UNEQUAL)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize(
    ("schedule", "copies", "extra", "ranks"),
    [("1f1b", 1, 0, 1), ("zb1p", 1, 0, 1), ("dualpipe", 2, 1, 1), ("dualpipev", 2, 1, 2)],
)
def test_memory_of_the_published_table(
    schedule: str, copies: int, extra: int, ranks: int, stages: int, micro_batches: int
) -> None:
    pipe = pipeline(schedule, stages, micro_batches)
    step = report_step(pipe, pipeline_timeline(pipe, UNEQUAL))
    assert pipe.copies == copies
    assert max(step.activations) == stages + extra
    assert len(pipe.programs) == stages // ranks


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pass_runs_once(schedule: str) -> None:
    pipe = pipeline(schedule, 8, 20)
    parts = [part for cells in pipe.programs for cell in cells for part in cell.parts]
    assert len(parts) == len(set(parts))
    done = {(p.stage, p.micro_batch, p.direction) for p in parts if p.kind == "F"}
    assert len(done) == 8 * 20
    assert {(p.stage, p.micro_batch, p.direction) for p in parts if p.kind in "BI"} == done
    split = {(p.stage, p.micro_batch, p.direction) for p in parts if p.kind == "I"}
    assert {(p.stage, p.micro_batch, p.direction) for p in parts if p.kind == "W"} == split


@pytest.mark.parametrize(
    ("parts", "bubble", "optimizer", "step", "tokens_per_day"),
    [
        ({"F": 1.13, "B": 1.99, "W": 0.48, "F&B": 13.95}, 2.06, 0.29, 19.926, 272.80e9),
        ({"F": 1.13, "B": 1.99, "W": 0.48, "F&B": 14.00}, 2.03, 0.31, 19.946, 272.52e9),
    ],
)
def test_the_training_step_of_deepseek_v3(
    parts: dict[str, float], bubble: float, optimizer: float, step: float, tokens_per_day: float
) -> None:
    """arXiv 2505.09343, Table 4: 16 stages, 120 sequences of 4096 tokens for each of 128 pipelines.

    The parts become chunk times, the simulation gives the parts back, and the published bubble is met by one delay for
    each transfer between ranks; then the step is the published one.
    """
    pipe = pipeline("dualpipe", 16, 120)
    times = times_from_parts(pipe, parts)
    low, high = 0.0, 0.05
    for _ in range(9):
        send = (low + high) / 2
        report = report_step(pipe, pipeline_timeline(pipe, times, send))
        low, high = (send, high) if sum(report.idle) / 16 < bubble else (low, send)
    assert {k: sum(rank[k] for rank in report.parts) / 16 for k in parts} == pytest.approx(parts)
    assert report.length + optimizer == pytest.approx(step, rel=2e-3)
    tokens = 15360 * 4096
    assert tokens / (report.length + optimizer) * 86400 == pytest.approx(tokens_per_day, rel=2e-3)


def test_transfers_lengthen_the_step() -> None:
    pipe = pipeline("1f1b", 4, 8)
    plain = report_step(pipe, pipeline_timeline(pipe, UNEQUAL)).length
    assert report_step(pipe, pipeline_timeline(pipe, UNEQUAL, send=0.1)).length >= plain + 6 * 0.1 - 1e-9
    assert any(" to rank " in item.name for item in pipeline_activities(pipe, UNEQUAL, send=0.1))


@pytest.mark.parametrize(
    ("schedule", "stages", "micro_batches"),
    [
        ("1f1b", 0, 4),
        ("dualpipe", 5, 20),
        ("dualpipe", 8, 15),
        ("dualpipe", 8, 14),
        ("dualpipev", 8, 6),
        ("gpipe", 4, 8),
    ],
)
def test_wrong_pipelines(schedule: str, stages: int, micro_batches: int) -> None:
    with pytest.raises(BadPipeline, match="needs"):
        pipeline(schedule, stages, micro_batches)
