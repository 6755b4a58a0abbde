"""An emulated network card, for measuring on one machine, where data travels at the speed of memory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from moec.runtime.distributed.world import Axis


class Card:
    """A card that sends `gbit` Gbit/s, one exchange after the other.

    Rows that leave a rank are there when they have really moved and the card would have sent them. The rank sleeps for
    what is missing, so that no core is busy meanwhile.
    """

    def __init__(self, gbit: float) -> None:
        self._seconds_per_byte = 8 / (gbit * 1e9)
        self._free = 0.0

    def send(self, work: Any, nbytes: int) -> Sent:
        """Put so many bytes behind what the card has to send; `work` is their real way."""
        self._free = max(self._free, time.perf_counter()) + nbytes * self._seconds_per_byte
        return Sent(work, self._free)

    def serve(self, axes: Iterable[Axis]) -> None:
        """Send all rows along these axes from here on."""
        for axis in axes:
            axis.card = self


class Sent:
    """A handle as torch.distributed gives them."""

    def __init__(self, work: Any, due: float) -> None:
        self._work, self._due = work, due

    def wait(self) -> None:
        """Return once the data are there and the card would be done."""
        self._work.wait()
        time.sleep(max(0.0, self._due - time.perf_counter()))
