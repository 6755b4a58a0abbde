"""How far a rank is in its exchanges: what tells a rank that waits from the one that it waits for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Waiting:
    """A rank's own part of an exchange is done, the others' is awaited: the `number`-th along `axis`, with `ranks`."""

    axis: str
    number: int
    ranks: tuple[int, ...]


@dataclass
class Progress:
    """Exchanges of a rank: how many it has taken part in along each axis, and those that it waits for.

    Costs an addition an exchange; the watch reads it from its own thread.
    """

    started: Counter[str] = field(default_factory=Counter)
    waiting: tuple[Waiting, ...] = ()

    def start(self, axis: str) -> int:
        """This rank has given its part; returns the number of the exchange."""
        self.started[axis] += 1
        return self.started[axis]

    @contextmanager
    def wait(self, *exchanges: Waiting) -> Iterator[None]:
        """Inside, this rank only waits for others. An error leaves the place where it was."""
        self.waiting = exchanges
        yield
        self.waiting = ()


@dataclass(frozen=True)
class Standing:
    """What a rank tells the others: where it is, in words and as a number that grows with every change."""

    number: int = 0
    where: str = "at the start"
    started: Mapping[str, int] = field(default_factory=dict)
    waiting: tuple[Waiting, ...] = ()

    def text(self) -> str:
        """One line for the store."""
        waiting = [(w.axis, w.number, w.ranks) for w in self.waiting]
        return json.dumps([self.number, self.where, dict(self.started), waiting])

    @staticmethod
    def parse(text: str) -> Standing:
        """The inverse of `text`."""
        number, where, started, waiting = json.loads(text)
        return Standing(number, where, started, tuple(Waiting(axis, n, tuple(ranks)) for axis, n, ranks in waiting))

    def lacks(self, others: Mapping[int, Standing]) -> list[int]:
        """The ranks that have not given their part to what this one waits for."""
        missing = {r for w in self.waiting for r in w.ranks if r in others and others[r].given(w) < w.number}
        return sorted(missing)

    def given(self, exchange: Waiting) -> int:
        """Exchanges that the rank has given its part to along the same axis."""
        return self.started.get(exchange.axis, 0)


def awaited(rank: int, ranks: Mapping[int, Standing]) -> list[int]:
    """The ranks that hold `rank` up in the end, through any chain of ranks that wait for others in turn.

    They have not taken part in an exchange that others wait in, and wait for nobody who has not either. Empty when
    every rank has taken part in what `rank` waits for, or when ranks wait for each other in a circle.
    """
    met, todo = {rank}, [rank]
    busy, at_rest = [], []
    while todo:
        here = todo.pop()
        missing = [r for r in ranks[here].lacks(ranks) if r != here]
        if not ranks[here].waiting:
            busy.append(here)
        elif not missing and here != rank:
            at_rest.append(here)
        todo += [r for r in missing if r not in met]
        met.update(missing)
    return sorted(busy or at_rest)
