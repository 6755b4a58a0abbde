"""Timelines as Chrome trace events, which Perfetto opens: planned, simulated and measured runs in one form.

Format: "Trace Event Format" (Google, the Catapult project): complete events (`ph` X) with microsecond times, a
process for each device, a thread for each track, and metadata events that name and order them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.errors import InputError
from moec.files import write_whole

EXPOSED_TRACK = "exposed communication"
"""Track for the time in which only communication runs."""


class TraceNotRead(InputError):
    """A file that is missing or is not a trace of ours."""

    template = "{path}: cannot read the trace: {reason}"


@dataclass(frozen=True)
class Span:
    """Something that ran from `start_us` for `us` microseconds on one track (a stream or resource) of a device."""

    name: str
    track: str
    start_us: float
    us: float
    device: str = "device 0"
    args: Mapping[str, Any] = field(default_factory=dict)


def trace_events(spans: Iterable[Span]) -> dict[str, Any]:
    """The trace as one JSON object.

    Devices and tracks keep the order of their first span. Spans of a track that overlap in time get further lanes
    (`sm`, `sm #2`, ...): on one thread the format only allows nested events.
    """
    ordered = sorted(enumerate(spans), key=lambda item: (item[1].start_us, -item[1].us, item[0]))
    events: list[dict[str, Any]] = []
    names = _Names(events, [span for _, span in sorted(ordered)])
    lanes: dict[tuple[str, str], list[float]] = {}
    for _, span in ordered:
        ends = lanes.setdefault((span.device, span.track), [])
        lane = next((k for k, end in enumerate(ends) if end <= span.start_us), len(ends))
        ends[lane : lane + 1] = [span.start_us + span.us]
        pid, tid = names.ids(span.device, span.track, lane)
        event = {"ph": "X", "name": span.name, "cat": span.track, "pid": pid, "tid": tid}
        events.append({**event, "ts": span.start_us, "dur": span.us, "args": dict(span.args)})
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def write_trace(path: str | Path, spans: Iterable[Span]) -> None:
    """Write the trace whole or not at all; raises NotWritten."""
    write_whole(Path(path), json.dumps(trace_events(spans), allow_nan=False))


def read_trace(path: str | Path) -> list[Span]:
    """The spans of a trace as `write_trace` leaves it; lanes of a track come together again. Raises TraceNotRead."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        devices = {e["pid"]: str(e["args"]["name"]) for e in events if e["name"] == "process_name"}
        return [
            Span(str(e["name"]), str(e["cat"]), float(e["ts"]), float(e["dur"]), devices[e["pid"]], dict(e["args"]))
            for e in events
            if e["ph"] == "X"
        ]
    except OSError as error:
        raise TraceNotRead(path=path, reason=error.strerror) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TraceNotRead(path=path, reason=str(error)) from None
    except (KeyError, TypeError, ValueError) as error:
        raise TraceNotRead(path=path, reason=f"an event has no proper {error}") from None


class _Names:
    """Numbers for devices and lanes, announced by metadata events in a stable order."""

    _LANES = 1000
    """Thread numbers set aside for the lanes of one track."""

    def __init__(self, events: list[dict[str, Any]], spans: list[Span]) -> None:
        self._events = events
        self._devices: dict[str, int] = {}
        self._tracks: dict[tuple[str, str], int] = {}
        self._known: set[tuple[int, int]] = set()
        for span in spans:
            if span.device not in self._devices:
                pid = self._devices[span.device] = len(self._devices) + 1
                self._announce("process", pid, 0, span.device, pid)
            self._tracks.setdefault((span.device, span.track), len(self._tracks) + 1)

    def ids(self, device: str, track: str, lane: int) -> tuple[int, int]:
        pid, tid = self._devices[device], self._tracks[device, track] * self._LANES + lane
        if (pid, tid) not in self._known:
            self._known.add((pid, tid))
            self._announce("thread", pid, tid, f"{track} #{lane + 1}" if lane else track, tid)
        return pid, tid

    def _announce(self, kind: str, pid: int, tid: int, name: str, rank: int) -> None:
        for suffix, args in (("name", {"name": name}), ("sort_index", {"sort_index": rank})):
            self._events.append({"ph": "M", "name": f"{kind}_{suffix}", "pid": pid, "tid": tid, "args": args})
