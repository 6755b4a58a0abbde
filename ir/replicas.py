"""Which copy of an expert a token goes to: a rule over plain integers that every rank computes alike. Needs numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moec.ir.module import Module

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio modulo 1 fill [0, 1) evenly at every length (Weyl's sequence)."""


def default_slots(experts: int, slots: int) -> list[int]:
    """The expert of every slot when no placement is given: all experts in order, then the first ones again."""
    return [slot % experts for slot in range(slots)]


@dataclass(frozen=True, eq=False)
class Replicas:
    """The slots of one layer: `experts_of[slot]` is the expert there, `shares[slot]` its part of the expert's tokens.

    Without shares the copies of an expert share its tokens evenly.
    """

    experts_of: tuple[int, ...]
    experts: int
    shares: tuple[float, ...] | None = None

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Slots by expert, the first of each expert in that list, and where each share ends, offset by the expert."""
        experts_of = np.asarray(self.experts_of, dtype=np.int64)
        by_expert = np.argsort(experts_of, kind="stable")
        counts = np.bincount(experts_of, minlength=self.experts)
        first = np.concatenate(([0], np.cumsum(counts)))
        given = np.ones(len(experts_of)) if self.shares is None else np.asarray(self.shares, dtype=np.float64)
        ends = given[by_expert].copy()
        for e in range(self.experts):
            part = slice(first[e], first[e + 1])
            total = ends[part].sum()
            ends[part] = e + np.cumsum(ends[part] / total) if total > 0 else e + np.arange(1, counts[e] + 1) / counts[e]
            ends[first[e + 1] - 1] = e + 1
        return by_expert, first, ends

    def choose(self, ids: NDArray[np.integer], source: int) -> NDArray[np.int64]:
        """The slot of each token-expert pair `ids[T, k]` of the tokens that rank `source` of the group sends.

        The n-th pair of an expert goes to the copy whose share holds the n-th term of Weyl's sequence; each source
        starts at another term, so that few tokens from many ranks spread as well as many from one.
        """
        flat = np.asarray(ids, dtype=np.int64).reshape(-1)
        by_expert, _, ends = self._tables
        order = np.argsort(flat, kind="stable")
        ranked = flat[order]
        starts = np.searchsorted(ranked, ranked, side="left")
        number = np.empty(len(flat), dtype=np.int64)
        number[order] = np.arange(len(flat)) - starts
        # Below 1 by more than a rounding, so that the sum stays within the expert.
        where = flat + np.minimum(np.mod((number + 0.5 + source * 7) * GOLDEN, 1.0), 1 - 1e-9)
        chosen: NDArray[np.int64] = by_expert[np.searchsorted(ends, where, side="right")]
        return chosen.reshape(np.shape(ids))

    def table(self) -> NDArray[np.int32]:
        """The rule for a device, i32[experts + 1 + 2 * slots]: where each expert's copies begin, their slots, and
        where their shares end in units of 2**-32 (the bits of an unsigned number; the last copy takes the rest)."""
        by_expert, first, ends = self._tables
        within = (ends - np.asarray(self.experts_of)[by_expert]) * 2.0**32
        bits = np.clip(within, 0, 2**32 - 1).astype(np.uint32).view(np.int32)
        return np.concatenate((first.astype(np.int32), by_expert.astype(np.int32), bits))


def replicas_of(module: Module, layer: int, experts: int, slots: int) -> Replicas:
    """The slots of a layer (counted from the first with experts) as the module's attributes place them.

    `placement` lists the expert of every slot, layer by layer; `replica_shares`, where given, the slots' shares.
    """
    placed, shares = module.attrs.get("placement"), module.attrs.get("replica_shares")
    if not isinstance(placed, tuple):
        return Replicas(tuple(default_slots(experts, slots)), experts)
    if layer >= len(placed):
        raise ValueError(f"the placement has {len(placed)} layers, layer {layer} was asked for")
    row = placed[layer]
    if not isinstance(row, tuple) or len(row) != slots:
        raise ValueError(f"the placement of layer {layer} must list the experts of {slots} slots")
    given = shares[layer] if isinstance(shares, tuple) else None
    return Replicas(row, experts, given)  # type: ignore[arg-type]
