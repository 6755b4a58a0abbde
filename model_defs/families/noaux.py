"""Grouped heads with the gate of DeepSeek-V3: GLM-4.5 (arXiv 2508.06471) and dots.llm1 (arXiv 2506.05767)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import decoder, dense, grouped, layer_count, noaux_gate, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import QWEN_EXPERTS
from moec.model_defs.spec import Attention, Decoder, Experts, Layer

ROPES = ("linear", "dynamic", "yarn", "llama3")


def read_glm4(raw: Mapping[str, Any], name: str) -> Decoder:
    """GLM-4.5: a part of each head is turned; biases, and norms of each head in the larger model."""
    f = Fields(raw, name)
    norm = "head" if f.flag("use_qk_norm", False) else ""
    part = {"partial_rotary_factor": 0.5} if "partial_rotary_factor" not in str(raw) else {}
    f.raw = {**f.raw, **part}
    attention = grouped(f, *ROPES, bias=f.flag("attention_bias", False), norm=norm)
    return _layers(f, attention, [0] * layer_count(f))


def read_dots1(raw: Mapping[str, Any], name: str) -> Decoder:
    """dots.llm1: norms of each head; some layers may have a window."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    return _layers(f, grouped(f, *ROPES, bias=bias, out_bias=bias, norm="head"), windows(f, layer_count(f)))


def _layers(f: Fields, attention: Attention, window: list[int]) -> Decoder:
    inter = f.size("moe_intermediate_size")
    shared = f.size("n_shared_experts", default=0, least=0) * inter
    experts = Experts(f.size("n_routed_experts", "num_local_experts"), inter, noaux_gate(f), shared=shared)
    first = f.size("first_k_dense_replace", default=0, least=0)
    f.only("moe_layer_freq", 1)
    plain = dense(f)
    layers = [Layer(replace(attention, window=w), plain if i < first else experts) for i, w in enumerate(window)]
    return decoder(f, layers, harmless=("num_nextn_predict_layers", "ep_size", "seq_aux", "aux_loss_alpha"))


FAMILIES = [
    Family("glm4_moe", ("glm4_moe",), read_glm4, QWEN_EXPERTS),
    Family("dots1", ("dots1",), read_dots1, QWEN_EXPERTS),
]
