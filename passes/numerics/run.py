"""What an evaluation leaves: the results of the entries and the values of every op on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir import Function, Op


@dataclass(frozen=True)
class Step:
    """One op of one call of a function, and its values."""

    function: str
    call: int
    op: Op
    results: list[torch.Tensor]

    def place(self) -> tuple[object, ...]:
        """Function, call and source line: ops that may stand for one another before and after a pass."""
        loc = self.op.loc
        return (self.function, self.call, *((loc.file, loc.line) if loc else (self.op.name,)))


Routing = tuple[str, object, int]
"""A routing of tokens: the gate, the micro-batch, and how often they met."""


class Run:
    """Results of the entries, and the values of all ops by function, call and source line."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, int, int], torch.Tensor] = {}
        self.rows: dict[tuple[str, int, int], list[int]] = {}
        """Tokens of the chunk whose rows a result holds."""
        self.steps: list[Step] = []
        self.routed: dict[Routing, torch.Tensor] = {}
        self.scores: dict[Routing, torch.Tensor] = {}
        """Experts, and scores before their non-linearity, of every routing."""
        self.ranks: list[Run] = []
        """The runs of the ranks, where there are several."""
        self.nudged = False
        """Whether a token was given other experts than its scores alone choose."""
        self._calls: Counter[str] = Counter()
        self._routings: Counter[tuple[str, object]] = Counter()

    def of_rank(self, rank: int, ranks: int) -> Run | None:
        """The run of one of `ranks` ranks; None when there was another number of them."""
        runs = self.ranks or [self]
        return runs[rank] if len(runs) == ranks else None

    def routing(self, op: Op) -> Routing:
        """The next routing by an op: a schedule turns the order of micro-batches, never that of a gate's layers."""
        gate = op.operands[1]
        key = gate.name, op.attrs.get("micro_batch")
        self._routings[key] += 1
        return (*key, self._routings[key])

    def note(self, function: Function, op: Op, results: list[Any]) -> None:
        """Record an op of a call; a call begins with the function's first op."""
        if op is function.ops[0]:
            self._calls[function.name] += 1
        tensors = [r for r in results if isinstance(r, torch.Tensor)]
        if tensors:
            self.steps.append(Step(function.name, self._calls[function.name], op, tensors))
