"""What the driver asks of streams and events while work is captured (CUDA programming guide, "CUDA Graphs").

A stream joins a capture by waiting for an event recorded in it; one that joined must be waited for by the first before
the capture ends; a captured stream waits for no event from outside, nobody outside for one from inside; nothing is
waited for by the host, and no memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable

Noted = list[Callable[[], object]]
INVALID_VALUE, UNSUPPORTED, UNJOINED, ISOLATION, CAPTURED_EVENT = 1, 900, 904, 905, 907
"""CUresult."""


class Captures:
    """One capture at a time, as our runtime makes them."""

    def __init__(self) -> None:
        self.origin: int | None = None
        self.number = 0
        self.noted: Noted = []
        self.clock: dict[int, dict[int, int]] = {}
        """Of every captured stream: how far it is behind each of them."""
        self.events: dict[int, tuple[int, dict[int, int]]] = {}
        """Events that were recorded in a capture: in which, and what they are behind."""

    def begin(self, stream: int) -> int:
        if self.origin is not None or not stream:
            return UNSUPPORTED
        self.origin, self.noted, self.clock = stream, [], {stream: {}}
        self.number += 1
        return 0

    def end(self, stream: int) -> tuple[int, Noted]:
        """The status, and what was noted."""
        if stream != self.origin:
            return INVALID_VALUE, []
        behind, noted = self.clock[stream], self.noted
        joined = all(behind.get(s, 0) == clock.get(s, 0) for s, clock in self.clock.items())
        self.origin, self.noted, self.clock = None, [], {}
        return 0 if joined else UNJOINED, noted

    def note(self, stream: int, action: Callable[[], object]) -> bool:
        """Whether the stream is captured, and the action noted."""
        if stream not in self.clock:
            return False
        self._step(stream)
        self.noted.append(action)
        return True

    def _step(self, stream: int) -> None:
        self.clock[stream][stream] = self.clock[stream].get(stream, 0) + 1

    def record(self, event: int, stream: int) -> int:
        if stream in self.clock:
            self.events[event] = self.number, dict(self.clock[stream])
        else:
            self.events.pop(event, None)
        return 0

    def wait(self, stream: int, event: int) -> int:
        number, behind = self.events.get(event, (0, {}))
        if not number:
            return ISOLATION if stream in self.clock else 0
        if self.origin is None or number != self.number:
            return CAPTURED_EVENT
        clock = self.clock.setdefault(stream, {})
        for other, count in behind.items():
            clock[other] = max(clock.get(other, 0), count)
        self._step(stream)
        return 0

    def synchronise(self, stream: int) -> int:
        return UNSUPPORTED if stream in self.clock else 0

    def unsafe(self) -> int:
        """The status of a call that no capture of this thread allows."""
        return 0 if self.origin is None else UNSUPPORTED
