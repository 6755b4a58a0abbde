"""Which change of one degree of a layout would help a phase most, with the same requests on the same devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moec.errors import MoecError
from moec.ir import Module
from moec.passes.planning.layout import Layout, LayoutRequest, levelling_slots, resolve
from moec.passes.planning.plan import Plan
from moec.passes.planning.search import Bench, batch_of


@dataclass(frozen=True)
class Alternative:
    """A layout that differs in one degree, and the relative gain in tokens/s of a device."""

    change: str
    layout: Layout
    gain: float


def alternatives(module: Module, plan: Plan) -> dict[str, list[Alternative]]:
    """Neighbours of the plan's layout that fit the memory, by phase, best first; empty on a single device."""
    return {phase: _of_phase(module, plan, phase) for phase in plan.phases}


def _of_phase(module: Module, plan: Plan, phase: str) -> list[Alternative]:
    bench = Bench(module, plan.target, plan.recipe, plan.options, phase, math.inf)
    batch, now = batch_of(plan.options, phase), plan.phases[phase].per_device
    found = []
    for change, layout in _neighbours(module, plan):
        requests = batch * layout.tp / plan.layout.tp
        if requests == int(requests) and (candidate := bench.at(layout, int(requests))) is not None:
            found.append(Alternative(change, layout, candidate.per_device / now - 1))
    return sorted(found, key=lambda a: -a.gain)


def _neighbours(module: Module, plan: Plan) -> Iterator[tuple[str, Layout]]:
    own = plan.layout
    if own.ranks == 1:
        return
    extra = own.slots - own.experts
    asked: list[tuple[str, LayoutRequest]] = []
    for twice in (True, False):
        other = [n * 2 if twice else n // 2 for n in (own.tp, own.ep, own.pp)]
        tp, ep, pp = (
            n if n >= 1 and n != was else None for n, was in zip(other, (own.tp, own.ep, own.pp), strict=True)
        )
        # A halved or doubled group keeps its slots a device where that holds all experts.
        if tp:
            asked.append((f"TP {tp}", _request(own, tp=tp)))
        if ep and own.experts:
            asked.append((f"EP {ep}", _request(own, ep=ep, redundant=_redundant(own, ep))))
        if pp:
            stage = own.ranks // pp
            ep = min(own.ep, stage)
            asked.append((f"PP {pp}", _request(own, pp=pp, ep=ep, redundant=_redundant(own, ep))))
    if own.experts and own.ep > 1:
        more, less = extra + own.ep, extra - own.ep
        asked.append((f"{more} redundant experts", _request(own, redundant=more)))
        if less >= 0:
            asked.append((f"{less} redundant experts", _request(own, redundant=less)))
    for change, request in asked:
        try:
            yield change, resolve(module, plan.target, plan.recipe, request)[0]
        except MoecError:
            continue


def _redundant(own: Layout, ep: int) -> int | None:
    """Redundant experts that even out the loads over another group."""
    return levelling_slots(own.experts, ep) - own.experts if own.experts else None


def _request(own: Layout, **other: int | None) -> LayoutRequest:
    kept = {"tp": own.tp, "ep": own.ep, "pp": own.pp, "redundant": own.slots - own.experts if own.experts else None}
    return LayoutRequest(ranks=own.ranks, **{**kept, **other})  # type: ignore[arg-type]
