"""A pipeline with several calls under way: what a stage sends on and gets back is waited for once it is needed.

A stage runs its calls one after the other in one workspace. It goes on with the next call while a later stage works on
what it sent, and takes the logits of a call when they are asked for (GPipe, arXiv 1811.06965, forward only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.world import Exchange
from moec.runtime.engine import Logits
from moec.runtime.steps import Collective


def may_wait(step: Collective) -> bool:
    """Whether nothing that a stage computes in the same call depends on an exchange."""
    return step.name == "send" or (step.name == "recv" and step.attrs["carries"] == "logits")


@dataclass(frozen=True)
class Late:
    """An exchange that has been started; `array` f32[R, V] fills with what it brings, None when it sends."""

    monitor: Monitor
    what: str
    exchange: Exchange
    array: NDArray[Any] | None

    def finish(self) -> None:
        """Wait for it."""
        with self.monitor.communication(self.what, layer=None):
            self.exchange.wait()


@dataclass(frozen=True)
class Started:
    """A call whose results are computed here (`logits`), or come from the last stage with one of `late`."""

    logits: Logits
    late: list[Late]

    def finish(self) -> Logits:
        """The logits of the call."""
        found = self.logits
        for one in self.late:
            one.finish()
            if one.array is not None:
                found = np.asarray(one.array, dtype=np.float32)
        return found
