"""Discrete-event simulation of activities on streams, with shared resources and meetings between devices.

A stream runs its activities one at a time, in the given order, as a CUDA stream or a pipeline rank does. Where running
activities together ask for more of a resource than there is, they slow down: rates are max-min fair (Bertsekas and
Gallager, "Data Networks", sec. 6.5.2), as flows on a link.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moec.errors import InputError
from moec.simulate.trace import Span

_ROUNDING = 1e-12


class BadActivity(InputError):
    """An activity that cannot be simulated: its name or duration, what it waits for or what it asks for."""

    template = "activity {name!r} {problem}"


class Deadlock(InputError):
    """Every activity that has not run waits for another one."""

    template = "the simulation stops at {now:.10g} us: {waiting} wait for each other; check the order on their streams"


@dataclass(frozen=True)
class Activity:
    """Work of `us` microseconds at full rate.

    It starts once all activities in `after` have ended, those before it on its `stream` too (None: no stream), and,
    with a `meeting`, all activities of that meeting can start (a collective over devices). `demand` (resource ->
    amount) is what it takes of a resource at full rate.
    """

    name: str
    us: float
    stream: str | None = None
    after: tuple[str, ...] = ()
    demand: Mapping[str, float] = field(default_factory=dict)
    device: str = "device 0"
    meeting: str | None = None


def simulate(activities: Sequence[Activity], capacities: Mapping[str, float] | None = None) -> list[Span]:
    """Run all activities; the spans come in the order of `activities`, on the tracks of their streams.

    A resource without a capacity is never short. Raises BadActivity and Deadlock.
    """
    return _Simulation(activities, capacities or {}).run()


def with_stragglers(activities: Iterable[Activity], spread: float, seed: int) -> list[Activity]:
    """The activities with durations multiplied by log-normal factors of median 1 and standard deviation `spread`.

    `spread` is that of the factor's logarithm: 0.05 makes about one activity in six more than 5 % slower. The same seed
    gives the same factors.
    """
    draw = random.Random(seed)
    return [replace(item, us=item.us * draw.lognormvariate(0.0, spread)) for item in activities]


def on_devices(activities: Iterable[Activity], devices: int, collectives: Iterable[str] = ()) -> list[Activity]:
    """The same program on every device, each with its own streams and resources; `collectives` meet across devices."""
    program, meeting = list(activities), set(collectives)

    def copy(item: Activity, device: str) -> Activity:
        return replace(
            item,
            name=f"{device}/{item.name}",
            stream=item.stream and f"{device}/{item.stream}",
            after=tuple(f"{device}/{name}" for name in item.after),
            demand={f"{device}/{resource}": amount for resource, amount in item.demand.items()},
            device=device,
            meeting=item.name if item.name in meeting else None,
        )

    return [copy(item, f"device {k}") for k in range(devices) for item in program]


def fair_rates(demands: Sequence[Mapping[str, float]], capacities: Mapping[str, float]) -> list[float]:
    """The max-min fair rates (0 to 1) of activities with these demands on resources of these capacities (above 0)."""
    rates = [0.0] * len(demands)
    growing = set(range(len(demands)))
    left = dict(capacities)
    while growing:
        load = {r: sum(demands[i].get(r, 0.0) for i in growing) for r in left}
        room = {r: left[r] / amount for r, amount in load.items() if amount > 0}
        step = min([1 - rates[next(iter(growing))], *room.values()])
        for i in growing:
            rates[i] += step
        for resource, amount in load.items():
            left[resource] -= step * amount
        full = {r for r, ratio in room.items() if ratio <= step * (1 + _ROUNDING)}
        growing = {i for i in growing if rates[i] < 1 - _ROUNDING and not any(demands[i].get(r) for r in full)}
    return rates


class _Simulation:
    def __init__(self, activities: Sequence[Activity], capacities: Mapping[str, float]) -> None:
        self._all = list(activities)
        self._capacities = capacities
        self._index = {item.name: i for i, item in enumerate(self._all)}
        if len(self._index) < len(self._all):
            twice = next(item.name for i, item in enumerate(self._all) if self._index[item.name] != i)
            raise BadActivity(name=twice, problem="is listed twice")
        self._waits = [0] * len(self._all)
        self._releases: list[list[int]] = [[] for _ in self._all]
        self._meetings: dict[str, list[int]] = {}
        self._connect()
        self._absent = {name: len(members) for name, members in self._meetings.items()}
        self._left = [item.us for item in self._all]
        self._started = [math.nan] * len(self._all)
        self._ended = [math.nan] * len(self._all)

    def run(self) -> list[Span]:
        now, running = 0.0, list[int]()
        for i, waits in enumerate(self._waits):
            if not waits:
                running += self._arrive(i, now)
        while running:
            rates = self._rates(running)
            step = min(self._left[i] / rate for i, rate in zip(running, rates, strict=True))
            now += step
            ended = []
            for i, rate in zip(running, rates, strict=True):
                self._left[i] -= rate * step
                if self._left[i] <= _ROUNDING * self._all[i].us:
                    ended.append(i)
            running = [i for i in running if i not in set(ended)]
            for i in ended:
                self._ended[i] = now
                for j in self._releases[i]:
                    self._waits[j] -= 1
                    if not self._waits[j]:
                        running += self._arrive(j, now)
        stuck = [item.name for i, item in enumerate(self._all) if math.isnan(self._ended[i])]
        if stuck:
            shown = ", ".join(stuck[:6]) + (f" and {len(stuck) - 6} more" if len(stuck) > 6 else "")
            raise Deadlock(now=now, waiting=shown, names=stuck)
        return [
            Span(item.name, item.stream or "(no stream)", begun, ended - begun, item.device)
            for item, begun, ended in zip(self._all, self._started, self._ended, strict=True)
        ]

    def _connect(self) -> None:
        last: dict[str, int] = {}
        for i, item in enumerate(self._all):
            if not 0 <= item.us < math.inf:
                raise BadActivity(name=item.name, problem=f"lasts {item.us:g} us")
            if missing := [r for r, amount in item.demand.items() if amount > 0 and self._capacities.get(r, 1) <= 0]:
                raise BadActivity(name=item.name, problem=f"asks for {missing[0]!r}, of which there is none")
            before = set()
            for name in item.after:
                if name not in self._index:
                    raise BadActivity(name=item.name, problem=f"waits for {name!r}, which does not exist")
                before.add(self._index[name])
            if item.stream is not None:
                if item.stream in last:
                    before.add(last[item.stream])
                last[item.stream] = i
            self._waits[i] = len(before)
            for j in before:
                self._releases[j].append(i)
            if item.meeting is not None:
                self._meetings.setdefault(item.meeting, []).append(i)

    def _arrive(self, i: int, now: float) -> list[int]:
        """The activities that start because i can: itself, or all of its meeting once nobody is absent."""
        meeting, starting = self._all[i].meeting, [i]
        if meeting is not None:
            self._absent[meeting] -= 1
            starting = [] if self._absent[meeting] else self._meetings[meeting]
        for j in starting:
            self._started[j] = now
        return starting

    def _rates(self, running: list[int]) -> list[float]:
        if not self._capacities:
            return [1.0] * len(running)
        return fair_rates([self._all[i].demand for i in running], self._capacities)
