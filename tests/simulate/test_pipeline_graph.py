"""Whole pipelines given to the scheduler: legal under the memory of the published ones, and no longer than they are."""

from __future__ import annotations

import pytest

from moec.passes.scheduling import Solution, check, solve
from moec.simulate.pipeline import SCHEDULES, pipeline
from moec.simulate.pipeline_graph import Chain, chains_of, pipeline_graph, published_schedule
from moec.simulate.step import ChunkTimes, pipeline_timeline, report_step


def most_held(chains: list[Chain], found: Solution) -> int:
    """Most micro-batches between the start of their forward and the end of their weight pass, over all stages."""
    most = 0
    for c, chain in enumerate(chains):
        for stage in range(len(chain.ranks)):
            events = []
            for m in range(chain.micro_batches):
                name = f"{stage}.{m}" + "r" * c
                end = found.schedule.start_us[f"W{name}"] + 1.0
                events += [(found.schedule.start_us[f"F{name}"], 1), (end - 1e-6, -1)]
            held = 0
            for _, step in sorted(events):
                held += step
                most = max(most, held)
    return most


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_found_pipelines_are_no_longer_than_published_ones(schedule: str) -> None:
    """Passes of one length on four stages; overlapping gains nothing here, so that all is a matter of order."""
    times = ChunkTimes(forward=1.0, backward=2.0, weight=1.0, overlapped=3.0)
    pipe = pipeline(schedule, 4, 8)
    published = report_step(pipe, pipeline_timeline(pipe, times))
    chains = chains_of(pipe)
    graph = pipeline_graph(chains, times)
    assert len(graph.tasks) == 3 * sum(len(c.ranks) * c.micro_batches for c in chains)
    found = solve(graph)
    assert found.makespan_us <= published.length + 1e-9
    assert most_held(chains, found) <= chains[0].held[0]
    if schedule in ("1f1b", "zb1p"):
        # Eight micro-batches of three passes, and three before and behind the last stage: what ZB1P reaches too.
        assert found.makespan_us == pytest.approx(8 * 3 + 3)
        assert found.optimal


def test_memory_costs_time() -> None:
    """One micro-batch at a time passes through all stages before the next one starts."""
    times = ChunkTimes(1.0, 2.0, 1.0, 3.0)
    alone = solve(pipeline_graph([Chain((0, 1, 2), 3, (1, 1, 1))], times))
    assert alone.makespan_us == pytest.approx(3 * (3 + 3 + 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_search_that_begins_with_the_published_schedule_ends_no_longer(schedule: str) -> None:
    """Twelve micro-batches on six ranks with hardly any search: what is found is what was given, or shorter."""
    part = 0.5 if schedule == "dualpipev" else 1.0
    times = ChunkTimes(forward=part, backward=2 * part, weight=0.7 * part, overlapped=3 * part)
    pipe = pipeline(schedule, 12 if schedule == "dualpipev" else 6, 12)
    published = report_step(pipe, pipeline_timeline(pipe, times))
    graph = pipeline_graph(chains_of(pipe), times)
    start = published_schedule(pipe, times)
    check(graph, start)
    found = solve(graph, effort=0.02, start=start)
    assert found.makespan_us <= published.length + 1e-9
