"""Run a scheduled module event by event: its text alone says what runs where, for how long and after what.

Ops with a stream run beside other streams, events carry order between them, an op without a stream waits for all and
all wait for it. Exchanges first take all SMs to send, then the link, then all SMs to receive. Where ops ask for more
SMs than the device has they slow down (`moec.simulate.events`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moec.errors import InputError
from moec.ir import Function, Module
from moec.ir.issue import Issued, Tracer, entries
from moec.passes.scheduling.pieces import covered, subtract
from moec.simulate.events import Activity, on_devices, simulate, with_stragglers
from moec.simulate.trace import EXPOSED_TRACK, Span

SM, LINK = "sm", "link"
DEFAULT = "compute"
"""Stream of the ops that have none."""


class NoTimes(InputError):
    """A module whose ops carry no predicted times."""

    template = (
        "{name} has no predicted times (attribute us): compile it for a target with several devices, for example"
        " moec compile MODEL --target h800-ep32 --plan-only --out DIR"
    )


class NoEntry(InputError):
    """A phase that the module does not have."""

    template = "no phase {phase}; the module has {known}"


def entry_of(module: Module, phase: str | None) -> Function:
    """The entry of a phase, the first one without a name; raises NoEntry."""
    known = {f.name: f for f in entries(module)}
    if phase is None and known:
        return next(iter(known.values()))
    if phase not in known:
        raise NoEntry(phase=phase, known=", ".join(known) or "none")
    return known[phase]


def program_activities(module: Module, entry: Function, cores: int) -> list[Activity]:
    """The ops of an entry on one device as activities; raises NoTimes when none carries a time."""
    walk = _Walk(cores)
    for issued in Tracer(module).run(entry):
        walk.add(issued)
    if not walk.activities:
        raise NoTimes(name=f"@{entry.name}")
    return walk.activities


def run_program(
    module: Module, entry: Function, cores: int, devices: int = 1, spread: float = 0.0, seed: int = 0
) -> list[Span]:
    """The timeline of an entry: a track for each stream of each device, and the time in which only exchanges run.

    Exchanges meet: the data are under way once the slowest device has sent. spread: standard deviation of the logarithm
    of every duration's factor, with a seed.
    """
    activities = program_activities(module, entry, cores)
    meetings = [a.name for a in activities if LINK in a.demand]
    arguments = {a.name: a for a in activities}
    if devices > 1:
        activities = on_devices(activities, devices, meetings)
    if spread:
        activities = with_stragglers(activities, spread, seed)
    capacities: dict[str, float] = {}
    for device in range(devices):
        prefix = f"device {device}/" if devices > 1 else ""
        capacities |= {f"{prefix}{SM}": float(cores), f"{prefix}{LINK}": 1.0}
    spans = []
    for span in simulate(activities, capacities):
        name = span.name.partition("/")[2] if devices > 1 else span.name
        track = span.track.partition("/")[2] if devices > 1 else span.track
        planned = arguments[name]
        args = {"planned_us": planned.us, **{k: v for k, v in planned.demand.items()}}
        spans.append(replace(span, name=name.partition("#")[0], track=track, args=args))
    return spans + exposed(spans)


def exposed(spans: Sequence[Span]) -> list[Span]:
    """For each device the pieces of time in which data are under way and nothing is computed."""
    found = []
    for device in dict.fromkeys(s.device for s in spans):
        links, compute = (
            covered((s.start_us, s.start_us + s.us) for s in spans if s.device == device and (LINK in s.args) is link)
            for link in (True, False)
        )
        found += [Span("exposed", EXPOSED_TRACK, a, b - a, device) for a, b in subtract(links, compute)]
    return found


class _Walk:
    """Turns ops in the order of issue into activities with the names of what they wait for."""

    def __init__(self, cores: int) -> None:
        self.activities: list[Activity] = []
        self._cores = float(cores)
        self._last: dict[str, str] = {}
        self._pending: dict[str, list[str]] = {}
        self._events: dict[object, list[str]] = {}
        self._barrier: list[str] = []

    def add(self, issued: Issued) -> None:
        op, stream = issued.op, issued.stream
        if op.name == "event.record":
            self._events[op.attrs["event"]] = [self._last[stream]] if stream in self._last else list(self._barrier)
        elif op.name == "event.wait":
            self._pending.setdefault(stream, []).extend(self._events.get(op.attrs["event"], []))
        elif "us" in op.attrs:
            after = self._after(stream)
            for name, us, demand in self._parts(issued):
                self.activities.append(Activity(name, us, stream or DEFAULT, tuple(after), demand))
                after = [name]
            self._last[stream] = after[0]
            if not stream:
                self._barrier = after
                self._last = dict.fromkeys(self._last, after[0]) | {"": after[0]}

    def _after(self, stream: str) -> list[str]:
        if not stream:
            return list(dict.fromkeys(self._last.values()))
        waited = self._pending.pop(stream, [])
        own = [self._last[stream]] if stream in self._last else self._barrier
        return list(dict.fromkeys([*own, *waited]))

    def _parts(self, issued: Issued) -> Iterator[tuple[str, float, dict[str, float]]]:
        op = issued.op
        part = f".{op.attrs['micro_batch']}" if "micro_batch" in op.attrs else ""
        layer = "" if issued.layer is None else f" {issued.layer}"
        unique = f"{op.name}{part}{layer}#{len(self.activities)}"
        us = float(str(op.attrs["us"]))
        if issued.stream in ("", DEFAULT):
            yield unique, us, {SM: float(str(op.attrs.get("sms", self._cores)))}
            return
        send, receive = (float(str(op.attrs.get(key, 0.0))) for key in ("send_us", "receive_us"))
        if send:
            yield f"send {unique}", send, {SM: self._cores}
        kept = float(str(op.attrs.get("sms", 0)))
        yield unique, us - send - receive, {LINK: 1.0} | ({SM: kept} if kept else {})
        if receive:
            yield f"receive {unique}", receive, {SM: self._cores}
