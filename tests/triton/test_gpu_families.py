"""Families with heads of keys and values on a GPU: every op has a kernel, and small models give the right logits.

The small models keep what is special to a family: windows, chunks of positions, sinks, biases, norms of heads, partial
and missing rotations, several layers a turn, gated shared experts, layer norms, weighed inputs of experts.
"""

from __future__ import annotations

from typing import Any

import pytest

import moec
from moec.codegen.triton.program import lower_module
from moec.model_defs.registry import preset_names

SMALL = {"hidden_size": "64", "intermediate_size": "48", "num_hidden_layers": "2", "num_attention_heads": "4",
         "num_key_value_heads": "2", "vocab_size": "96"}  # fmt: skip
HEAD = {"head_dim": "16"}
EXPERTS = {"moe_intermediate_size": "32", "num_experts": "4", "num_experts_per_tok": "2"}
FAMILIES: dict[str, dict[str, str]] = {
    "mixtral-8x7b": {"num_local_experts": "4", "sliding_window": "4"},
    "qwen3-30b-a3b": {**EXPERTS, **HEAD},
    "gpt-oss-20b": {**HEAD, "num_local_experts": "4", "num_experts_per_tok": "2", "sliding_window": "4"},
    "llama-4-scout": {**HEAD, "num_local_experts": "4", "intermediate_size_mlp": "48", "attention_chunk_size": "4",
                      "num_hidden_layers": "4"},
    "phi-3.5-moe": {"num_local_experts": "4"},
    "glm-4.5-air": {**HEAD, "n_routed_experts": "4", "moe_intermediate_size": "32", "num_experts_per_tok": "2"},
    "qwen1.5-moe-a2.7b": {**EXPERTS, "shared_expert_intermediate_size": "48"},
    "granite-3.0-1b-a400m": {"num_local_experts": "4", "num_experts_per_tok": "2"},
    "hunyuan-a13b": {**HEAD, "num_experts": "4", "moe_topk": "2", "moe_intermediate_size": "48"},
    "llama-3.2-1b": {},
}  # fmt: skip
FAST = ("mixtral-8x7b", "gpt-oss-20b")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in FAMILIES])
def test_logits_of_a_family(interpreter: Any, name: str) -> None:
    """In float32, where a wrong address, mask or order shows at once; six positions cross windows and chunks."""
    found = interpreter(
        "prompts_error", target="h800", recipe="fp32", settings={**SMALL, **FAMILIES[name]}, tokens=6, model=name
    )
    assert found["whole"] < 1e-5 and found["steps"] < 1e-5, found
    assert not found["idle"], "kernels that no launch uses"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in preset_names()]
)
def test_every_preset_has_kernels(name: str) -> None:
    plan = moec.trace(name).optimize("h800")
    assert lower_module(plan.ir, plan.context.target, vars(plan.context.limits), tiles={}).table.entries
