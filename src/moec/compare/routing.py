"""Routing decisions: which differ from the reference's because two scores are equal but for rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.compare.result import relative_error
from moec.ir import OPS, Op

SCORE_ROUNDING = 1e-5
"""Scores this close, in units of a token's greatest, are equal but for the order of FP32 sums."""


@dataclass(frozen=True)
class Routing:
    """Error of a routing op, tokens with other experts by a near tie, and tokens with other experts without one."""

    error: float
    near_ties: int
    rerouted: int


def check_routing(
    op: Op, operands: list[Any], got: list[torch.Tensor], expected: list[torch.Tensor], ctx: Any
) -> Routing:
    """Compare ids i32[T, k] and weights f32[T, k] of a `moe.route`; the order of a token's experts does not matter.

    A token's experts are right when the reference chooses them too once their scores are raised, and all others
    lowered, by rounding. The nudge goes through the bias, which by definition steers the choice and not the weights.
    """
    x, gate, *bias = operands
    evaluate, experts = OPS["moe.route"].evaluate, gate.shape[0]
    ids, weights = expected[0].clone(), expected[1].clone()
    chosen = _chosen(got[0], experts)
    differing = (chosen != _chosen(ids, experts)).any(1).nonzero()[:, 0].tolist()
    all_scores = {**op.attrs, "top_k": experts, "groups": 1, "top_groups": 1, "normalise": False, "scale": 1.0}
    ties = 0
    for t in differing:
        token = x[t : t + 1]
        rounding = SCORE_ROUNDING * float(evaluate([token, gate], all_scores, ctx)[1].max())
        nudge = torch.where(chosen[t], rounding, -rounding).to(gate.dtype)
        nudged = evaluate([token, gate, bias[0] + nudge if bias else nudge], op.attrs, ctx)
        if bool((_chosen(nudged[0], experts)[0] == chosen[t]).all()):
            ties += 1
            ids[t], weights[t] = nudged[0][0], nudged[1][0]
    error = relative_error(_by_expert(got[0], got[1], experts), _by_expert(ids, weights, experts))
    rerouted = len(differing) - ties
    return Routing(max(error, 1.0) if rerouted else error, ties, rerouted)


def _chosen(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(ids), experts, dtype=torch.bool).scatter_(1, ids.long(), True)


def _by_expert(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(ids), experts, dtype=weights.dtype).scatter_add_(1, ids.long(), weights)
