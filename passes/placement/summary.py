"""What a placement is worth, in figures: balance, the price of its constraints, traffic, and what redundancy buys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.passes.placement.movement import moved_slots
from moec.passes.placement.partners import together
from moec.passes.placement.placement import Placement
from moec.passes.placement.problem import Floats, Problem, Shares, smallest_slots
from moec.passes.placement.solve import Result, place
from moec.passes.placement.traffic import Traffic, paired_traffic, routed_traffic, sample_routing

_SAMPLED_TOKENS = 512


@dataclass(frozen=True)
class Routing:
    """How the model's router chooses: `top_k` experts, from at most `top_groups` groups where groups matter."""

    top_k: int
    top_groups: int


@dataclass(frozen=True)
class TrafficEstimate:
    """Traffic between nodes: what loads and recorded co-activation leave open (`least` to `most`), or one sample twice.

    `sampled` says that choices were drawn from the loads alone, as if experts were chosen independently.
    """

    least: Traffic
    most: Traffic
    sampled: bool


@dataclass(frozen=True)
class Redundancy:
    """Greatest device load over the mean device load with a number of redundant slots."""

    slots_per_device: int
    redundant: int
    mean: float
    worst: float


def estimate_traffic(
    problem: Problem, placement: Placement, routing: Routing, coactivation: Floats | None, seed: int = 0
) -> TrafficEstimate:
    """Traffic of the placement; exact bounds when `coactivation` [layers, experts, experts] is known."""
    if coactivation is not None:
        least, most = paired_traffic(placement, problem.loads, coactivation, routing.top_k)
        return TrafficEstimate(least, most, sampled=False)
    rng = np.random.default_rng(seed)
    limited = problem.groups if routing.top_groups < problem.groups else 1
    chosen = np.stack(
        [
            sample_routing(rng, loads, _SAMPLED_TOKENS, routing.top_k, limited, routing.top_groups)
            for loads in problem.loads
        ]
    )
    traffic = routed_traffic(rng, placement, chosen)
    return TrafficEstimate(traffic, traffic, sampled=True)


def what_redundancy_buys(problem: Problem, shares: Shares, *, points: int = 5) -> list[Redundancy]:
    """Balance for the smallest number of slots a device and the next ones, up to one beyond the problem's own."""
    first = smallest_slots(problem.experts, problem.devices)
    last = max(problem.slots_per_device + 1, first + 2)
    widths = sorted({int(w) for w in np.linspace(first, last, points).round()} | {problem.slots_per_device})
    curve = []
    for width in widths:
        wider = Problem(problem.loads, problem.devices, width, problem.nodes, problem.groups)
        over = place(wider, shares=shares).over_mean
        curve.append(Redundancy(width, wider.redundant, float(over.mean()), float(over.max())))
    return curve


def summarise(
    result: Result, *, traffic: TrafficEstimate | None, coactivation: Floats | None, previous: Placement | None
) -> dict[str, Any]:
    """The figures as plain numbers and lists, ready for JSON."""
    problem, placement = result.problem, result.placement
    figures: dict[str, Any] = {
        "layers": problem.layers,
        "experts": problem.experts,
        "devices": problem.devices,
        "nodes": problem.nodes,
        "slots_per_device": problem.slots_per_device,
        "redundant": problem.redundant,
        "balance": _spread(result.balance),
        "over_mean": _spread(result.over_mean),
        "price_of_groups": _spread(result.price_of_groups) if problem.bound_to_nodes else None,
        "greatest_device_load": result.greatest.tolist(),
        "lower_bound": result.bound.tolist(),
    }
    if traffic is not None:
        figures["traffic"] = {
            "sampled": traffic.sampled,
            "copies_per_token": traffic.least.copies_direct,
            "copies_per_token_forwarded": [traffic.least.copies_forwarded, traffic.most.copies_forwarded],
            "between_nodes": traffic.most.between(forwarding=False).tolist(),
            "between_nodes_forwarded": traffic.most.between(forwarding=True).tolist(),
        }
    if coactivation is not None:
        pairs = np.triu(coactivation + coactivation.transpose(0, 2, 1), 1).sum() / 2
        figures["pairs_on_one_node"] = float(together(placement, coactivation).sum() / pairs) if pairs else 1.0
    if previous is not None:
        figures["moved_slots"] = moved_slots(placement, previous)
    return figures


def _spread(values: Floats) -> dict[str, float | int]:
    return {"mean": float(values.mean()), "worst": float(values.max()), "worst_layer": int(values.argmax())}
