"""Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import decoder, dense, grouped, layer_count, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import LAYER, QWEN_EXPERTS, swiglu
from moec.model_defs.spec import Attention, Decoder, Experts, Gate, Layer

ROPES = ("linear", "dynamic", "yarn", "llama3")


def read_qwen2(raw: Mapping[str, Any], name: str) -> Decoder:
    """Qwen2-MoE: biases on query, key and value; a shared expert behind a gate of its own."""
    f = Fields(raw, name)
    attention = grouped(f, *ROPES, bias=f.flag("qkv_bias", True))
    shared = f.size("shared_expert_intermediate_size", default=5632)
    return _layers(f, attention, windows(f, layer_count(f)), shared=shared, shared_gate=True)


def read_qwen3(raw: Mapping[str, Any], name: str) -> Decoder:
    """Qwen3-MoE: norms of each head of query and key, no shared expert."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    attention = grouped(f, *ROPES, bias=bias, out_bias=bias, norm="head")
    window = f.size("sliding_window", default=0, least=0, most=1 << 27)
    used = f.flag("use_sliding_window", False)
    return _layers(f, attention, [window if used else 0] * layer_count(f))


def _layers(f: Fields, attention: Attention, window: list[int], **shared: Any) -> Decoder:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    gate = Gate(f.size("num_experts_per_tok"), "softmax", normalise=f.flag("norm_topk_prob", False))
    experts = Experts(f.size("num_experts", "num_local_experts"), f.size("moe_intermediate_size"), gate, **shared)
    step, without = f.size("decoder_sparse_step", default=1), f.sizes("mlp_only_layers")
    plain = dense(f)
    layers = []
    for i, w in enumerate(window):
        routed = i not in without and (i + 1) % step == 0
        layers.append(Layer(replace(attention, window=w), experts if routed else plain))
    return decoder(f, layers)


QWEN2_NAMES = {
    **QWEN_EXPERTS,
    **swiglu(LAYER + "mlp.shared_expert.", "mlp.shared."),
    "mlp.shared_gate": (LAYER + "mlp.shared_expert_gate.weight",),
}
FAMILIES = [
    Family("qwen2_moe", ("qwen2_moe",), read_qwen2, QWEN2_NAMES),
    Family("qwen3_moe", ("qwen3_moe",), read_qwen3, QWEN_EXPERTS),
]
