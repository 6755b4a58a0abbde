"""Ranks that feed different prompts do the same phase at the same time."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.world import World

NOTHING, DECODE, PREFILL = range(3)
"""What a rank has to do next; the greatest of all ranks is done by all, by some with no token. Above `PREFILL`: prefill
of so many more pieces."""


class Meeting(ABC):
    """An engine's side of the agreement."""

    world: World
    monitor: Monitor

    @abstractmethod
    def idle(self, phase: int) -> None:
        """Take part in a call with no token."""

    def drain(self) -> None:
        """Take part in the others' calls until no rank has anything to do."""
        self.meet(NOTHING)

    def meet(self, wanted: int) -> int:
        """Return when all ranks do what this one wants; take part with no token in what comes before.

        Returns how many pieces of prompts others feed beyond this rank's.
        """
        if self.world.mesh.dp == 1:
            return 0  # every rank has the same sequences
        while (agreed := self._agree(wanted)) != wanted:
            if wanted >= PREFILL:
                return agreed - wanted
            for _ in range(max(1, agreed - PREFILL + 1)):
                self.idle(min(agreed, PREFILL))
        return 0

    def _agree(self, wanted: int) -> int:
        with self.monitor.communication("the agreement on the next step", layer=None):
            return self.world.agree(wanted)
