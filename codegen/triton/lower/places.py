"""Where values lie on the device, and how a launch refers to them in plan.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.arena import Slot
from moec.codegen.triton.fused.binding import cache_distances
from moec.ir import CacheType
from moec.ir.types import SCALE_BITS

Step = dict[str, Any]
"""One step of a program as plan.json holds it: a launch, a fill, a copy, a loop over layers, or an event."""


@dataclass(frozen=True)
class Base:
    """Memory that no slot of the arena holds: `input`, `weights`, `cache` or `output`, and a name in it.

    `turn`: bytes by which it moves with every turn of the loop over layers.
    """

    kind: str
    name: str
    turn: int = 0


@dataclass(frozen=True)
class Place:
    """A value's first byte and its distances in elements: between rows, and between heads of a row."""

    base: Slot | Base
    offset: int
    row: int
    head: int
    itemsize: int

    def part(self, start: int) -> Place:
        """The columns from `start` on."""
        return replace(self, offset=self.offset + start * self.itemsize)


@dataclass(frozen=True)
class Matrix:
    """What a tensor descriptor names: rows from a place on, as many as an expression over the run-time symbols says."""

    place: Place
    rows: str | int
    columns: int


def reference(place: Place | Matrix) -> dict[str, Any]:
    """The place as an argument of a launch."""
    if isinstance(place, Matrix):
        shape = {"shape": [place.rows, place.columns], "strides": [place.place.row, 1]}
        return {**reference(place.place), **shape}
    if isinstance(place.base, Slot):
        return {"base": "arena", "offset": place.base.offset + place.offset}
    base = place.base
    found: dict[str, Any] = {"base": base.kind, "name": base.name, "offset": place.offset}
    if base.turn:
        found["layer"] = base.turn
    return found


def cache_part(whole: Place, kind: CacheType, what: str) -> Place:
    """The scales or the exact part of a scaled cache, in elements of their own."""
    if what == "cache" or kind.quant is None:
        return whole
    _, scale_row, exact_row = cache_distances(kind)
    exact = 2 * kind.exact
    data = (int(kind.shape[3]) - kind.exact) * whole.itemsize  # type: ignore[arg-type]
    if what == "cache_scale":
        return Place(whole.base, whole.offset + data, scale_row, scale_row, SCALE_BITS[kind.quant.scale] // 8)
    return Place(whole.base, whole.offset + int(kind.row_bytes()) - exact, exact_row, exact_row, 2)  # type: ignore[arg-type]
