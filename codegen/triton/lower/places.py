"""Where values lie on the device, and how a launch refers to them in plan.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.arena import Slot

Step = dict[str, Any]
"""One step of a program as plan.json holds it: a launch, a fill, a copy, a loop over layers, or an event."""


@dataclass(frozen=True)
class Base:
    """Memory that no slot of the arena holds: `input`, `weights`, `cache` or `output`, and a name in it.

    `layer`: bytes from one layer's part to the next; `index`: the layer is the loop's plus this number, None when the
    memory belongs to no layer.
    """

    kind: str
    name: str
    layer: int = 0
    index: int | None = None


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


def reference(place: Place) -> dict[str, Any]:
    """The place as an argument of a launch."""
    if isinstance(place.base, Slot):
        return {"base": "arena", "offset": place.base.offset + place.offset}
    base = place.base
    found: dict[str, Any] = {"base": base.kind, "name": base.name, "offset": place.offset}
    if base.index is not None:
        found["offset"] += base.index * base.layer
        found["layer"] = base.layer
    return found
