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

from moec.runtime.cache import Sequence
from moec.runtime.engine import Logits
from moec.runtime.steps import Collective, Segment, Step, Turn, flat

if TYPE_CHECKING:
    from moec.runtime.distributed.engine import Binding, DistributedEngine, SteppedCall


@dataclass(frozen=True)
class Ran:
    """What a rank did: `stream` compute, comm (data under way) or wait (nothing else to do); seconds of one clock."""

    name: str
    stream: str
    start: float
    end: float


def shares(lengths: List[int], parts: int) -> list[list[int]]:
    """Sequences of each micro-batch: as many in each, to within one, and about as many cached tokens.

    `lengths` are the positions that each sequence attends to. The longest goes where the load is least among the parts
    that may take one more; a part lists its sequences in the order given.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    few, more = divmod(len(lengths), parts)
    room = [few + (k < more) for k in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        k = min((k for k in range(parts) if len(found[k]) < room[k]), key=lambda k: (load[k], k))
        found[k].append(i)
        load[k] += lengths[i]
    return [sorted(mine) for mine in found]


Exchange = tuple[str, int, Any]
"""Name, layer and the handle of an exchange that has been started."""


class Overlapped:
    """The decode step of an engine in `parts` micro-batches; `hide=False` waits for every exchange at once.

    With `turns`, those of an artifact's schedule, they are followed; else micro-batches change at every exchange.
    `ran` fills with what happened when it is a list.
    """

    def __init__(self, engine: DistributedEngine, parts: int, hide: bool = True, turns: tuple[Turn, ...] = ()) -> None:
        self.engine, self.hide, self.turns = engine, hide, turns
        self.ran: list[Ran] | None = None
        self._calls = [engine.another(-(-engine.batch // parts)) for _ in range(parts)]

    def decode(self, sequences: List[Sequence], tokens: List[int]) -> Logits:
        """As `Engine.decode`; every rank takes part in every micro-batch, with no rows where it has too few."""
        begun: list[tuple[SteppedCall, tuple[Step, ...], Binding]] = []
        parts = shares([s.length + 1 for s in sequences], len(self._calls))
        placed = []
        for call, mine in zip(self._calls, parts, strict=True):
            if mine:
                arrays, args = self.engine.place(call, [sequences[i] for i in mine], [tokens[i] for i in mine])
            else:
                arrays, args = call.idle()
            placed.append((call, mine, arrays))
            begun.append((call, call.begin(args[0]), args[0]))
        if self.turns:
            self._follow(begun)
        else:
            self._take_turns([self._turns(*b, -1, k) for k, b in enumerate(begun)])
        logits = np.empty((len(sequences), placed[0][2]["logits"].shape[1]), dtype=np.float32)
        for call, mine, arrays in placed:
            self.engine.record(call, arrays, len(mine))
            logits[mine] = arrays["logits"][: len(mine)]
        return logits

    def _follow(self, begun: list[tuple[SteppedCall, tuple[Step, ...], Binding]]) -> None:
        """The turns of the schedule. A dispatch first tells how many rows come; those start behind the next segment."""
        steps = flat(begun[0][1])
        under_way: dict[tuple[int, int, int], tuple[Iterator[Exchange], Exchange]] = {}
        counting: list[tuple[int, int, int]] = []

        def advance(key: tuple[int, int, int]) -> None:
            moves, exchange = under_way.pop(key)
            self._wait(*exchange)
            following = next(moves, None)
            if following is not None:
                under_way[key] = moves, following

        for turn in self.turns:
            (call, _, binding), step = begun[turn.part], steps[turn.step]
            key = turn.part, turn.layer, turn.step
            if turn.what == "run":
                for _ in self._turns(call, (step,), binding, turn.layer, turn.part):
                    raise AssertionError(f"{step} is run, not started")
                for early in counting:
                    advance(early)
                counting.clear()
            elif turn.what == "start":
                assert isinstance(step, Collective)
                moves = self._exchange(call, step, binding, turn.layer, turn.part)
                first = next(moves, None)
                if first is not None:
                    under_way[key] = moves, first
                    if step.name == "dispatch":
                        counting.append(key)
            if turn.what == "wait" or not self.hide:
                if key in counting:
                    counting.remove(key)
                while key in under_way:
                    advance(key)

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
