"""How far two evaluations lie apart, and which op departs first."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from moec.ir import print_op
from moec.passes.numerics.run import Run, Step

LEAST = 1e-9
"""Departure that a pass of tolerance 0 may show: the order of float64 sums."""
ROUNDING = 1e-3
"""Tolerances from here on admit rounded weights, by which a token's experts may change where scores are close."""
ROW = 2
"""Tolerances that the token that moves most may move by."""
OP = 3.5
"""Tolerances that a row of any op may move by: what residual sums hide behind it."""


@dataclass(frozen=True)
class Departure:
    """By how much results moved (relative to their norm), and the first op whose value did or that fails."""

    relative: float
    where: str

    def __str__(self) -> str:
        return f"results depart by {self.relative:.2g} (relative); {self.where}"


def distance(a: torch.Tensor, b: torch.Tensor | None) -> float:
    """|a - b| / |a|; infinite for another shape or values that are not finite."""
    if b is None or a.shape != b.shape or not torch.isfinite(b).all():
        return float("inf")
    a, b = a.double(), b.double()
    norm = a.norm().item()
    return (a - b).norm().item() / norm if norm else float(b.norm().item() > 0)


def worst_row(a: torch.Tensor, b: torch.Tensor | None) -> float:
    """The greatest |a - b| of a row in units of the rows' root mean square norm."""
    if b is None or a.shape != b.shape or not torch.isfinite(b).all():
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double().reshape(a.shape[0], -1), b.double().reshape(a.shape[0], -1)
    typical = a.norm(dim=1).square().mean().sqrt().item()
    worst = (a - b).norm(dim=1).max().item()
    return worst / typical if typical else float(worst > 0)


def hidden(before: Run, after: Run, bound: float) -> Departure | None:
    """The first op with a row that moved beyond `bound`, although the results did not: a wrong expert that few reach.

    Ops are those of one function, call, source line, name and shape, in order; where a pass changed their number they
    are not compared. Routing is judged by its scores: the order of a token's experts is free.
    """
    runs: list[defaultdict[object, list[tuple[Step, torch.Tensor]]]] = []
    for run in (before, after):
        runs.append(defaultdict(list))
        for step in run.steps:
            for i, r in enumerate(step.results):
                if r.is_floating_point() and step.op.name != "moe.route":
                    runs[-1][step.place(), step.op.name, i, r.shape].append((step, r))
    for key, steps in runs[1].items():
        if len(steps) == len(runs[0][key]):
            for (_, a), (step, b) in zip(runs[0][key], steps, strict=True):
                if (moved := worst_row(a, b)) > bound:
                    where = f"@{step.function}, call {step.call}: {print_op(step.op)}"
                    return Departure(moved, f"a row of one op does, results hide it; {where}")
    return None


def first(before: Run, after: Run, bound: float) -> str:
    """The first op to finish whose value no op of its function, call, source line, name and shape had before.

    An op of a new name stands for those of its line that it replaced when it is the last of them.
    """
    known: defaultdict[object, list[torch.Tensor]] = defaultdict(list)
    for step in before.steps:
        for r in step.results:
            known[step.place(), r.shape].append(r)
            known[step.place(), r.shape, step.op.name].append(r)
    last = {step.place(): step for step in after.steps}
    for step in after.steps:
        for r in step.results:
            old = known[step.place(), r.shape, step.op.name]
            if not old and last[step.place()] is step:
                old = known[step.place(), r.shape]
            moved = min((distance(o, r) for o in old), default=0.0)
            if moved > bound:
                return f"first in @{step.function}, call {step.call}, by {moved:.2g}: {print_op(step.op)}"
    return "no single op departs from those of its source line"
