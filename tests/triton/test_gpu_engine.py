"""An artifact for a GPU, run launch by launch: order, arguments, arena, cache pages and graphs against the evaluator.

Two layers with random weights. In float32 nothing hides: a wrong address or order shows at once. The kernels are those
of the artifact, in Triton's interpreter; the driver is a stand-in (standin.py).
"""

from __future__ import annotations

from typing import Any

import pytest

SMALL = {"num_hidden_layers": "2", "first_k_dense_replace": "1"}
ALL_CHOSEN = {**SMALL, "n_group": "1", "topk_group": "1", "num_experts_per_tok": "16"}
"""Every token goes to every expert, so that the rounding of two computations cannot choose different ones."""


@pytest.mark.parametrize(
    ("target", "recipe", "settings", "bound"),
    [
        ("h800", "fp32", SMALL, 1e-5),
        pytest.param("h800", "bf16", ALL_CHOSEN, 0.06, marks=pytest.mark.slow),
        pytest.param("h800", "deepseek-v3", ALL_CHOSEN, 0.5, marks=pytest.mark.slow),
        pytest.param("a100", "weight-only", ALL_CHOSEN, 0.06, marks=pytest.mark.slow),
        pytest.param("b200", "deepseek-v3", ALL_CHOSEN, 0.5, marks=pytest.mark.slow),
    ],
)
def test_logits_of_a_whole_model(interpreter: Any, target: str, recipe: str, settings: Any, bound: float) -> None:
    """Prompts whole through prefill, then token by token through captured decode graphs, two sequences at once."""
    found = interpreter("prompts_error", target=target, recipe=recipe, settings=settings, tokens=5)
    assert found["whole"] < bound and found["steps"] < bound, found
    assert found["replays"] == 4
    assert not found["idle"], "kernels that no launch uses"
    assert (found["maps"] > 0) == (target != "a100" and recipe != "fp32"), "tensor maps, where the copy engine has work"


@pytest.mark.parametrize("scale", ["f32", pytest.param("ue8m0", marks=pytest.mark.slow)])
def test_latent_cache_in_fp8(interpreter: Any, scale: str) -> None:
    """Written and read in its parts of a row; both sides round alike but for values on the edge of two numbers."""
    passes = [f"fp8-cast{{recipe=fp32,cache=fp8,scale={scale}}}"]
    found = interpreter("prompts_error", target="h800", recipe="fp32", settings=SMALL, tokens=5, passes=passes)
    assert found["whole"] < 5e-3 and found["steps"] < 5e-3, found
    assert not found["idle"]


SPARSE = {
    "num_hidden_layers": "2", "first_k_dense_replace": "1", "hidden_size": "64", "intermediate_size": "48",
    "moe_intermediate_size": "32", "num_attention_heads": "4", "q_lora_rank": "32",
    "kv_lora_rank": "128", "qk_rope_head_dim": "16", "qk_nope_head_dim": "16", "v_head_dim": "16",
    "n_routed_experts": "4", "n_group": "1", "topk_group": "1", "num_experts_per_tok": "2", "vocab_size": "96",
    "index_topk": "3", "index_n_heads": "16", "index_head_dim": "32",
}  # fmt: skip
"""With few heads some positions score zero, and which of equal ones torch takes is not defined."""


def test_sparse_attention(interpreter: Any) -> None:
    """DeepSeek-V3.2 in float32: index keys behind the latent rows, three positions of up to seven for each token."""
    found = interpreter(
        "prompts_error", target="h800", recipe="fp32", settings=SPARSE, tokens=7, model="deepseek-v3.2",
        passes=["mla-absorb{prefill=absorbed,decode=absorbed}"],
    )  # fmt: skip
    assert found["whole"] < 1e-5 and found["steps"] < 1e-5, found
    assert not found["idle"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "absorbed"])
def test_both_forms_of_attention_in_both_phases(interpreter: Any, form: str) -> None:
    spec = f"mla-absorb{{prefill={form},decode={form}}}"
    found = interpreter("prompts_error", target="h800", recipe="fp32", settings=SMALL, tokens=5, passes=[spec])
    assert found["whole"] < 1e-5 and found["steps"] < 1e-5, found
