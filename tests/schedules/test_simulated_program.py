"""The simulation of a scheduled module follows its text: streams, events, exchanges that meet, stragglers."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.cli import make_app
from moec.ir import parse_module
from moec.simulate.picture import picture
from moec.simulate.program import NoEntry, NoTimes, entry_of, exposed, program_activities, run_program
from moec.simulate.trace import EXPOSED_TRACK, Span

Text = Callable[..., str]

TWO_STREAMS = """module @m {version = 1} {
  func @f(%x: f32[4, 8]) -> f32[4, 8] {
    %0 = add %x, %x {stream = compute, us = 10.0} : f32[4, 8]
    event.record {event = 0, stream = compute}
    event.wait {event = 0, stream = comm}
    %1 = add %0, %x {stream = comm, us = 20.0, send_us = 2.0, receive_us = 3.0} : f32[4, 8]
    event.record {event = 1, stream = comm}
    %2 = add %0, %x {stream = compute, us = 4.0} : f32[4, 8]
    event.wait {event = 1, stream = compute}
    %3 = add %1, %2 {stream = compute, us = 5.0} : f32[4, 8]
    %4 = add %3, %3 {us = 1.0} : f32[4, 8]
    return %4
  }
}
"""


def starts(text: str, cores: int = 100) -> dict[int, tuple[float, float]]:
    module = parse_module(text)
    spans = [s for s in run_program(module, entry_of(module, None), cores) if s.track != EXPOSED_TRACK]
    return {i: (s.start_us, s.start_us + s.us) for i, s in enumerate(spans)}


def test_streams_events_and_parts_of_an_exchange() -> None:
    """Sending and the computation beside it share the SMs: 2 us and 4 us of them end after 4 and 6 us."""
    found = starts(TWO_STREAMS)
    assert found[0] == pytest.approx((0, 10))
    assert found[1] == pytest.approx((10, 14))
    assert found[2] == pytest.approx((14, 29))
    assert found[4] == pytest.approx((10, 16))
    assert found[3] == pytest.approx((29, 32))
    assert found[5] == pytest.approx((32, 37))
    assert found[6] == pytest.approx((37, 38))


def test_what_only_communicates_is_exposed() -> None:
    module = parse_module(TWO_STREAMS)
    spans = run_program(module, entry_of(module, "f"), 100)
    assert [(s.start_us, s.us) for s in spans if s.track == EXPOSED_TRACK] == [pytest.approx((16, 13))]
    link = Span("l", "comm", 0, 10, args={"link": 1.0})
    assert [(s.start_us, s.us) for s in exposed([link, Span("c", "compute", 2, 3, args={"sm": 1.0})])] == [
        (0, 2),
        (5, 5),
    ]


def test_a_plan_takes_what_it_promised(schedule_text: Text) -> None:
    """The steady state of the simulated program has the interval that the schedule promised, or less."""
    module = parse_module(schedule_text())
    promised = float(str(module.functions["moe_layers.decode.round"].attrs["interval_us"]))
    spans = run_program(module, module.functions["decode"], 132)
    ends = [s.start_us for s in spans if s.name.startswith("comm.combine.0")]
    gaps = [b - a for a, b in itertools.pairwise(ends[1:])]
    assert gaps and all(gap <= promised * 1.02 for gap in gaps)


def test_stragglers_hold_up_all_devices(schedule_text: Text) -> None:
    module = parse_module(schedule_text())
    entry = module.functions["decode"]
    alone = max(s.start_us + s.us for s in run_program(module, entry, 132))
    same = max(s.start_us + s.us for s in run_program(module, entry, 132, devices=3))
    slow = run_program(module, entry, 132, devices=3, spread=0.2, seed=1)
    assert same == pytest.approx(alone)
    assert max(s.start_us + s.us for s in slow) > alone
    assert slow == run_program(module, entry, 132, devices=3, spread=0.2, seed=1)
    assert {s.device for s in slow} == {f"device {k}" for k in range(3)}


def test_the_picture_is_well_formed(schedule_text: Text) -> None:
    module = parse_module(schedule_text())
    spans = run_program(module, module.functions["decode"], 132)
    root = xml.etree.ElementTree.fromstring(picture(spans, 0, 500, "a < b"))
    bars = [e for e in root.iter() if e.tag.endswith("rect")]
    assert len(bars) > 20
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "comm" in texts and "compute" in texts


def test_the_command_writes_trace_and_picture(
    schedule_text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.ir"
    file.write_text(schedule_text())
    arguments = ["simulate", str(file), "--trace", str(tmp_path / "t.json"), "--svg", str(tmp_path / "p.svg"), "--json"]
    make_app(arguments)(arguments, standalone_mode=False)
    answer = json.loads(capsys.readouterr().out)
    assert answer["phase"] == "decode" and 0 <= answer["hidden"] <= 1
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"compute", "comm"} <= tracks
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_modules_without_times_are_refused() -> None:
    body = "    %0 = add %x, %x : f32[4, 8]\n    return %0\n"
    text = f"module @m {{version = 1}} {{\n  func @f(%x: f32[4, 8]) -> f32[4, 8] {{\n{body}  }}\n}}\n"
    module = parse_module(text)
    with pytest.raises(NoTimes, match="@f has no predicted times"):
        program_activities(module, module.functions["f"], 1)
    with pytest.raises(NoEntry, match="no phase decode; the module has f"):
        entry_of(module, "decode")
