"""Pieces of time as (start, end): what they cover together, and what of that others leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Piece = tuple[float, float]


def covered(pieces: Iterable[Piece]) -> list[Piece]:
    """The union of the pieces, disjoint and in order; pieces without length cover nothing."""
    union: list[Piece] = []
    for start, end in sorted(pieces):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        elif end > start:
            union.append((start, end))
    return union


def subtract(whole: Sequence[Piece], removed: Sequence[Piece]) -> list[Piece]:
    """The parts of `whole` outside of `removed`; both disjoint and in order."""
    left: list[Piece] = []
    first = 0
    for start, end in whole:
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        at = first
        while at < len(removed) and removed[at][0] < end:
            low, high = removed[at]
            if low > start:
                left.append((start, low))
            start = max(start, high)
            at += 1
        if start < end:
            left.append((start, end))
    return left
