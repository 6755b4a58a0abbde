"""Memory in one arena: buffers whose lifetimes do not meet share their place.

Placed greedily, largest first (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """A run of units (the caller's: bytes, or elements) of the arena, alive from step `first` to step `last`."""

    size: int
    first: int
    last: int
    offset: int = -1


def at_once(x: Slot, y: Slot) -> bool:
    """Whether two slots are alive at the same step."""
    return x.first <= y.last and y.first <= x.last


def assign(slots: Sequence[Slot], meet: Callable[[Slot, Slot], bool] = at_once) -> int:
    """Give every slot its offset, apart from those that it may `meet`; returns the units that the arena needs."""
    placed: list[Slot] = []
    for slot in sorted(slots, key=lambda s: -s.size):
        meeting = sorted((p for p in placed if meet(p, slot)), key=lambda p: p.offset)
        offset = 0
        for p in meeting:
            if offset + slot.size <= p.offset:
                break
            offset = max(offset, p.offset + p.size)
        slot.offset = offset
        placed.append(slot)
    return max((s.offset + s.size for s in slots), default=0)
