"""Decode in micro-batches: while the rows of one are under way between ranks, another one is computed.

Every micro-batch runs the same native segments in a workspace of its own and stops where it has sent something. The
micro-batches take turns there in a fixed order, so that all ranks start their exchanges in the same order and results
do not depend on who is faster. Transport threads of gloo move the data meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cache import Sequence
from moec.runtime.engine import Logits
from moec.runtime.steps import Collective, Segment, Step

if TYPE_CHECKING:
    from moec.runtime.distributed.engine import Binding, DistributedEngine, SteppedCall


@dataclass(frozen=True)
class Ran:
    """What a rank did: `stream` compute, comm (data under way) or wait (nothing else to do); seconds of one clock."""

    name: str
    stream: str
    start: float
    end: float


Exchange = tuple[str, int, Any]
"""Name, layer and the handle of an exchange that has been started."""


class Overlapped:
    """The decode step of an engine in `parts` micro-batches; `hide=False` waits for every exchange at once.

    `ran` fills with what happened when it is a list.
    """

    def __init__(self, engine: DistributedEngine, parts: int, hide: bool = True) -> None:
        self.engine, self.hide = engine, hide
        self.ran: list[Ran] | None = None
        self._calls = [engine.another(-(-engine.batch // parts)) for _ in range(parts)]

    def decode(self, sequences: List[Sequence], tokens: List[int]) -> Logits:
        """As `Engine.decode`, the rows of all micro-batches in the order of `sequences`."""
        parts = len(self._calls)
        cuts = [len(sequences) * k // parts for k in range(parts + 1)]
        turns: list[Iterator[Exchange]] = []
        logits: list[NDArray[np.float32]] = []
        for k, call in enumerate(self._calls):
            mine = sequences[cuts[k] : cuts[k + 1]]
            if mine:
                arrays, args = self.engine.place(call, mine, tokens[cuts[k] : cuts[k + 1]])
                turns.append(self._turns(call, call.begin(args[0]), args[0], -1, k))
                logits.append(arrays["logits"])
        self._take_turns(turns)
        return np.concatenate(logits)

    def _take_turns(self, turns: list[Iterator[Exchange]]) -> None:
        pending: list[Exchange | None] = [None] * len(turns)
        running = list(range(len(turns)))
        while running:
            for k in list(running):
                if (exchange := pending[k]) is not None:
                    self._wait(*exchange)
                pending[k] = next(turns[k], None)
                while not self.hide and (exchange := pending[k]) is not None:
                    self._wait(*exchange)
                    pending[k] = next(turns[k], None)
                if pending[k] is None:
                    running.remove(k)

    def _wait(self, name: str, layer: int, work: Any) -> None:
        began = time.perf_counter()
        with self.engine.monitor.communication(name, None if layer < 0 else layer):
            work.wait()
        self._note(f"{name} {layer}", "wait", began)

    def _turns(
        self, call: SteppedCall, steps: tuple[Step, ...], binding: Binding, layer: int, part: int
    ) -> Iterator[Exchange]:
        for step in steps:
            if isinstance(step, Segment):
                began = time.perf_counter()
                if layer >= 0:
                    binding.step[0] = layer
                function, args = binding.segments[step]
                function(*args)
                self._note(f"{step.symbol}.{part} {layer}", "compute", began)
            elif isinstance(step, Collective):
                if step.name in ("dispatch", "combine"):
                    yield from self._exchange(call, step, binding, layer, part)
                else:
                    with self.engine.monitor.communication(step.name, None if layer < 0 else layer):
                        call.collectives.run(step, layer, binding)
            else:
                for inner in range(step.first, step.last + 1):
                    yield from self._turns(call, step.steps, binding, inner, part)

    def _exchange(
        self, call: SteppedCall, step: Collective, binding: Binding, layer: int, part: int
    ) -> Iterator[Exchange]:
        name = f"{step.name}.{part}"
        moves = call.collectives.moves(step, layer, binding)
        for work in moves:
            began = time.perf_counter()
            yield name, layer, work
            self._note(f"{name} {layer}", "comm", began)

    def _note(self, name: str, stream: str, began: float) -> None:
        if self.ran is not None:
            self.ran.append(Ran(name, stream, began, time.perf_counter()))
