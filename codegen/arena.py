"""Memory in one arena: buffers whose lifetimes do not meet share their place.

Placed greedily, largest first (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """A run of units (the caller's: bytes, or elements) of the arena, alive from step `first` to step `last`."""

    size: int
    first: int
    last: int
    offset: int = -1


def assign(slots: list[Slot]) -> int:
    """Give every slot its offset; returns the units that the arena needs."""
    placed: list[Slot] = []
    for slot in sorted(slots, key=lambda s: -s.size):
        meeting = sorted((p for p in placed if p.first <= slot.last and slot.first <= p.last), key=lambda p: p.offset)
        offset = 0
        for p in meeting:
            if offset + slot.size <= p.offset:
                break
            offset = max(offset, p.offset + p.size)
        slot.offset = offset
        placed.append(slot)
    return max((s.offset + s.size for s in slots), default=0)
