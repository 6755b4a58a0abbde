"""The router against the gates of transformers' DeepSeek-V3 and DeepSeek-V2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_runner import normal, run
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moec.codegen.tvm.router import RouterSpec, build_moe_route, scratch_elements
from moec.codegen.tvm.tir import Machine
from moec.codegen.tvm.vector import KernelSpecError


def spec(experts: int, top_k: int, **changes: Any) -> RouterSpec:
    fields: dict[str, Any] = {
        "score": "sigmoid",
        "has_bias": False,
        "groups": 1,
        "top_groups": 1,
        "group_score": "top2sum",
        "normalise": False,
        "scale": 1.0,
        "max_tokens": 64,
        "ld": experts,
    }
    return RouterSpec(experts, top_k, **(fields | changes))


def route(s: RouterSpec, logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = len(logits)
    ids = torch.full((tokens, s.top_k), -1, dtype=torch.int32)
    weights = torch.empty(tokens, s.top_k)
    scratch = torch.empty(scratch_elements(s, Machine()))
    inputs = [logits] if bias is None else [logits, bias]
    run(build_moe_route, s, *inputs, ids, weights, scratch, tokens)
    return ids.long(), weights


def dense(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(ids), experts).scatter(1, ids, weights)


def gate_weights(gate: Any, logits: torch.Tensor) -> torch.Tensor:
    """What a transformers gate makes of given logits: its projection is the identity."""
    gate.weight.data = torch.eye(logits.shape[1])
    with torch.no_grad():
        _, weights, ids = gate(logits)
    return dense(ids, weights, logits.shape[1])


@pytest.mark.parametrize("experts,top_k,groups,top_groups", [(256, 8, 8, 4), (64, 6, 1, 1), (12, 3, 3, 2)])
@pytest.mark.parametrize("normalise", [True, False])
def test_sigmoid_gate_is_deepseek_v3s(experts: int, top_k: int, groups: int, top_groups: int, normalise: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=experts,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )
    gate = DeepseekV3TopkRouter(config)
    gate.e_score_correction_bias.copy_(normal(experts, seed=5) * 0.1)
    logits = normal(40, experts)
    s = spec(experts, top_k, has_bias=True, groups=groups, top_groups=top_groups, normalise=normalise, scale=2.5)
    ids, weights = route(s, logits, gate.e_score_correction_bias.contiguous())
    torch.testing.assert_close(dense(ids, weights, experts), gate_weights(gate, logits), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("experts,top_k,groups,top_groups", [(160, 6, 8, 3), (64, 6, 1, 1), (10, 2, 5, 2)])
def test_softmax_gate_is_deepseek_v2s(experts: int, top_k: int, groups: int, top_groups: int) -> None:
    config = DeepseekV2Config(
        hidden_size=experts,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=top_groups,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        routed_scaling_factor=16.0,
    )
    logits = normal(40, experts) * 3
    s = spec(experts, top_k, score="softmax", groups=groups, top_groups=top_groups, group_score="max", scale=16.0)
    ids, weights = route(s, logits)
    expected = gate_weights(DeepseekV2TopkRouter(config), logits)
    torch.testing.assert_close(dense(ids, weights, experts), expected, rtol=3e-6, atol=1e-7)


def test_order_is_by_falling_score_then_rising_id() -> None:
    logits = torch.zeros(2, 40)
    logits[1, [33, 2, 17]] = torch.tensor([1.0, 2.0, 1.0])
    ids, _ = route(spec(40, 4), logits)
    assert ids.tolist() == [[0, 1, 2, 3], [2, 17, 33, 0]]


def test_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.zeros(1, 16), torch.zeros(16)
    bias[11] = 5.0
    ids, weights = route(spec(16, 1, has_bias=True), logits, bias)
    assert ids.item() == 11
    assert weights.item() == 0.5


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ids_are_valid_for_logits_that_are_not_numbers(score: str) -> None:
    logits = normal(6, 32)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = float("inf")
    logits[4] = -1e30
    ids, _ = route(spec(32, 6, score=score, groups=4, top_groups=2, group_score="max"), logits)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 32
    assert all(len(set(chosen)) == 6 for chosen in ids.tolist())


@pytest.mark.parametrize(
    "changes,problem",
    [
        ({"groups": 7}, "32 experts do not divide into 7 groups"),
        ({"groups": 4, "top_groups": 5}, "5 of 4 groups"),
        ({"groups": 4, "top_groups": 1, "top_k": 9}, "9 to choose of 8"),
        ({"groups": 32, "top_groups": 8}, "no two best"),
        ({"score": "tanh"}, "unknown score 'tanh'"),
    ],
)
def test_contradictory_gates_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(KernelSpecError, match=problem):
        spec(32, **({"top_k": 4} | changes))
