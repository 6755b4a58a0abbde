"""Phi-3.5-MoE (arXiv 2404.14219): layer norms, sparsemixer gate (arXiv 2409.12136), LongRoPE (arXiv 2402.13753)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import MIXTRAL_EXPERTS
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """Phi-3.5-MoE."""
    f = Fields(raw, name)
    f.size("original_max_position_embeddings", default=4096, most=1 << 27)
    bias = f.flag("attention_bias", False)
    attention = grouped(f, "longrope", theta=1e6, bias=bias, out_bias=bias)
    top_k, jitter = f.size("num_experts_per_tok"), f.number("router_jitter_noise", 0.01)
    if top_k != 2:
        raise f.fail(f"num_experts_per_tok must be 2, the experts that sparsemixer chooses, got {top_k}")
    gate = Gate(top_k, "sparsemixer", normalise=False, jitter=jitter)
    experts = Experts(f.size("num_local_experts"), f.size("intermediate_size"), gate)
    layers = [Layer(replace(attention, window=w), experts) for w in windows(f, layer_count(f), always=True)]
    eps = f.number("rms_norm_eps", 1e-5)
    return decoder(f, layers, norm="layer", eps=eps, head_bias=f.flag("lm_head_bias", False))


FAMILIES = [Family("phimoe", ("phimoe",), read, MIXTRAL_EXPERTS)]
