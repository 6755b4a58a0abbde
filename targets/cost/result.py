"""What an op costs: time, what bounds it, work, and the parts that make up the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Bound = Literal["compute", "memory", "network", "latency"]


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one call on one device; `a + b` is a then b.

    time_us: wall time. flops: useful floating-point operations. bytes: device memory traffic. sent_bytes: sent to
    other devices. parts: microseconds that compute, memory, network and latency would each take alone (they overlap,
    so they do not add up to the time). sms: cores that a communication kernel keeps busy. busy_us: the part of its
    time in which it takes all of them, before and after the data are under way.
    """

    time_us: float
    flops: float = 0.0
    bytes: float = 0.0
    sent_bytes: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    sms: int = 0
    busy_us: float = 0.0

    @property
    def bound(self) -> Bound:
        """The largest part."""
        order: tuple[Bound, ...] = ("compute", "memory", "network", "latency")
        return max(order, key=lambda name: self.parts.get(name, 0.0))

    def __add__(self, other: Cost) -> Cost:
        keys = {**self.parts, **other.parts}
        return Cost(
            self.time_us + other.time_us,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.sent_bytes + other.sent_bytes,
            {key: self.parts.get(key, 0.0) + other.parts.get(key, 0.0) for key in keys},
            max(self.sms, other.sms),
            self.busy_us + other.busy_us,
        )

    def __mul__(self, times: float) -> Cost:
        """The same call `times` times, one after the other."""
        return Cost(
            self.time_us * times,
            self.flops * times,
            self.bytes * times,
            self.sent_bytes * times,
            {key: value * times for key, value in self.parts.items()},
            self.sms,
            self.busy_us * times,
        )

    def as_json(self) -> dict[str, Any]:
        """The fields of one line of `moec cost --json`."""
        return {
            "time_us": self.time_us,
            "bound": self.bound,
            "flops": self.flops,
            "bytes": self.bytes,
            "sent_bytes": self.sent_bytes,
            "sms": self.sms,
            "busy_us": self.busy_us,
            "parts": dict(self.parts),
        }
