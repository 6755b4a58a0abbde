"""Traces in the form that Perfetto reads: complete events, named tracks, no overlap on a thread."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from moec.simulate.pipeline import pipeline
from moec.simulate.step import ChunkTimes, pipeline_timeline
from moec.simulate.trace import Span, trace_events, write_trace


def test_overlapping_spans_get_lanes_of_their_own() -> None:
    spans = [Span("a", "sm", 0, 10), Span("b", "sm", 5, 10), Span("c", "sm", 10, 2), Span("d", "nic", 0, 1)]
    events = trace_events(spans)["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    track = {e["name"]: names[e["pid"], e["tid"]] for e in events if e["ph"] == "X"}
    assert track == {"a": "sm", "b": "sm #2", "c": "sm", "d": "nic"}


def test_every_event_has_what_the_format_asks_for() -> None:
    pipe = pipeline("dualpipe", 4, 8)
    spans = pipeline_timeline(pipe, ChunkTimes(1, 2, 1, 2.6), send=0.1)
    trace = json.loads(json.dumps(trace_events(spans), allow_nan=False))
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    devices = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert sorted(devices) == [f"rank {k}" for k in range(4)]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == len(spans)
    for event in complete:
        assert event["dur"] >= 0 and event["ts"] >= 0
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(threads) == named
    for times in threads.values():
        ordered = sorted(times)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(ordered))


def test_an_empty_trace_is_a_trace() -> None:
    assert trace_events([])["traceEvents"] == []


def test_a_trace_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.json", [Span("a", "sm", 0, 1)])
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    with pytest.raises(match="cannot write"):
        write_trace(tmp_path / "none" / "t.json", [])
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
