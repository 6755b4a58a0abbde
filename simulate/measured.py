"""Timelines of measured runs in the form of the simulated ones, so that both lie over each other in one trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from moec.simulate.program import DEFAULT, LINK, exposed
from moec.simulate.trace import Span

COMM = "comm"
"""Stream of the exchanges."""

Ran = tuple[str, str, float, float]
"""What a rank did: name, stream, start and duration in microseconds; `wait` is a stream on which nothing runs."""


def measured(ran: Iterable[Ran], device: str) -> list[Span]:
    """The spans of one rank: computation, exchanges from their start to when they were waited for, and exposed time.

    An exchange that ended early shows as under way until somebody asked: what is exposed is the wait alone.
    """
    kept = [Span(name, stream, start, us, device) for name, stream, start, us in ran if stream in (DEFAULT, COMM)]
    spans = [replace(s, args={LINK: 1.0}) if s.track == COMM else s for s in kept]
    return spans + exposed(spans)


def beside(planned: Sequence[Span], run: Sequence[Span]) -> list[Span]:
    """Both timelines in one, devices told apart by what they are."""
    return [
        *(replace(s, device=f"planned {s.device}") for s in planned),
        *(replace(s, device=f"measured {s.device}") for s in run),
    ]
