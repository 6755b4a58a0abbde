"""Routing decisions: near ties are told from wrong choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.compare.result import relative_error
from moec.compare.routing import SCORE_ROUNDING, Routing, check_routing
from moec.ir import OPS, Module, Op
from moec.ir.evaluate import Evaluator, WeightPrograms

ATTRS: dict[str, Any] = {
    "score": "sigmoid", "groups": 1, "top_groups": 1, "group_score": "max", "top_k": 2, "normalise": True, "scale": 1.0,
}  # fmt: skip
X = torch.tensor([[1.0, 0.0, 0.0, 0.0]])


def route(
    logits: list[float], ids: list[int], bias: list[float] | None = None, order: int = 1, **attrs: Any
) -> Routing:
    """Check a kernel that chose `ids` with the right weights for one token whose gate gives `logits`."""
    module = Module("m")
    evaluator = Evaluator(module, WeightPrograms(module, lambda name, shape, dtype: torch.zeros(shape)))
    op = Op("moe.route", [], {**ATTRS, **attrs}, [])
    gate = torch.zeros(len(logits), 4)
    gate[:, 0] = torch.tensor(logits)
    operands = [X, gate, *([torch.tensor(bias)] if bias else [])]
    expected = OPS["moe.route"].evaluate(operands, op.attrs, evaluator)
    scores = torch.tensor(logits).sigmoid() if op.attrs["score"] == "sigmoid" else torch.tensor(logits).softmax(0)
    weights = scores[ids] / scores[ids].sum()
    got = [torch.tensor([ids[::order]], dtype=torch.int32), weights[None].flip(1) if order < 0 else weights[None]]
    return check_routing(op, operands, got, expected, evaluator)


def test_a_tie_within_rounding_is_no_departure() -> None:
    found = route([2.0, 1.0, 1.0 - 1e-6, -1.0], [0, 2])
    assert (found.near_ties, found.rerouted) == (1, 0)
    assert found.error < 1e-6


def test_a_clear_gap_is_a_departure() -> None:
    found = route([2.0, 1.0, 0.99, -1.0], [0, 2])
    assert (found.near_ties, found.rerouted) == (0, 1)
    assert found.error >= 1


@pytest.mark.parametrize(("gap", "ties"), [(SCORE_ROUNDING, 1), (4 * SCORE_ROUNDING, 0)])
def test_the_gap_is_measured_on_the_scores_and_their_bias(gap: float, ties: int) -> None:
    """The nudge moves both sides, so scores up to twice the rounding apart are taken as equal."""
    found = route([0.0, 0.0, 0.0, 0.0], [0, 2], bias=[0.5, 0.25 + gap * 0.5, 0.25, 0.0])
    assert (found.near_ties, found.rerouted) == (ties, 1 - ties)


def test_a_tie_of_groups_counts_too() -> None:
    """Of two groups with all but equal best scores either may be chosen."""
    groups: dict[str, Any] = {"groups": 2, "top_groups": 1, "group_score": "max"}
    assert route([1.0, 0.5, 1.0 - 1e-6, 0.2], [2, 3], **groups).near_ties == 1
    assert route([1.0, 0.5, 0.9, 0.2], [2, 3], **groups).rerouted == 1


def test_softmax_scores_are_scaled_by_the_greatest() -> None:
    """Of many experts every score is small; the same absolute gap is a clear one."""
    even = [0.0] * 62
    assert route([0.0, -1e-6, *even], [1, 5], score="softmax").near_ties == 1
    assert route([1e-3, 1e-3, *even], [0, 5], score="softmax").rerouted == 1


def test_the_order_of_a_tokens_experts_does_not_matter() -> None:
    assert route([2.0, 1.0, 0.0, -1.0], [0, 1], order=-1) == Routing(0.0, 0, 0)


def test_relative_error() -> None:
    expected = torch.tensor([1.0, -1.0])
    assert relative_error(expected + torch.tensor([0.5, 0.0]), expected) == 0.5
    assert relative_error(torch.tensor([1.0, float("nan")]), expected) == float("inf")
    assert relative_error(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0])) == 0.5
    assert relative_error(torch.tensor([7], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)) == 3
