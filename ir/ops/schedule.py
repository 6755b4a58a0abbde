"""Events between streams, as CUDA has them: recorded on one stream, waited for on another. They compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.module import Module
from moec.ir.optable import INT, STR, Attrs, OpDef, require
from moec.ir.types import Type


class _Event:
    """What both events share: they order streams and compute nothing."""

    results = ""
    attrs = {"event": INT, "stream": STR}
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        require(int(a["event"]) >= 0, f"an event is a number from 0 up, got {a['event']}")
        return []

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return []


class EventRecord(_Event, OpDef):
    """Signal `event` once all ops issued to `stream` so far have ended; recording again replaces the signal."""

    name = "event.record"


class EventWait(_Event, OpDef):
    """Ops issued to `stream` from here on start after the last signal of `event` that was recorded before this line."""

    name = "event.wait"
