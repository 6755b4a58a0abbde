"""Measured runs as timelines: exposed time is what was waited for, and both kinds of timelines share one trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.simulate.measured import beside, measured
from moec.simulate.trace import EXPOSED_TRACK, Span, TraceNotRead, read_trace, write_trace

RAN = [
    ("attention.0 3", "compute", 0.0, 40.0),
    ("attention.1 3", "compute", 40.0, 40.0),
    ("dispatch.0 3", "wait", 80.0, 20.0),
    ("dispatch.0 3", "comm", 40.0, 60.0),
    ("experts.0 3", "compute", 100.0, 30.0),
]


def test_exposed_time_is_what_was_waited_for() -> None:
    spans = measured(RAN, "rank 0")
    assert {s.track for s in spans} == {"compute", "comm", EXPOSED_TRACK}
    shown = [s for s in spans if s.track == EXPOSED_TRACK]
    assert [(s.start_us, s.us) for s in shown] == [(80.0, 20.0)]


def test_both_timelines_in_one_trace(tmp_path: Path) -> None:
    run = measured(RAN, "rank 0")
    write_trace(tmp_path / "run.json", run)
    read = read_trace(tmp_path / "run.json")
    assert sorted((s.name, s.track, s.start_us, s.us) for s in read) == sorted(
        (s.name, s.track, s.start_us, s.us) for s in run
    )
    both = beside([Span("attention.0 3", "compute", 0.0, 35.0)], read)
    assert {s.device for s in both} == {"planned device 0", "measured rank 0"}


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceNotRead, match="No such file"):
        read_trace(tmp_path / "none.json")
    for text in ("{", "[]", '{"traceEvents": [{"ph": "X"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(TraceNotRead, match="cannot read the trace"):
            read_trace(tmp_path / "bad.json")
