"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import QWEN_EXPERTS
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """OLMoE: norms over all heads of query and key together, values cut to ±clip_qkv where given."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    clip = f.number("clip_qkv", 0.0)
    attention = grouped(f, "linear", "dynamic", "yarn", "llama3", bias=bias, out_bias=bias, norm="wide", clip=clip)
    gate = Gate(f.size("num_experts_per_tok"), "softmax", normalise=f.flag("norm_topk_prob", False))
    experts = Experts(f.size("num_experts", "num_local_experts"), f.size("intermediate_size"), gate)
    return decoder(f, [Layer(attention, experts)] * layer_count(f), eps=f.number("rms_norm_eps", 1e-5))


FAMILIES = [Family("olmoe", ("olmoe",), read, QWEN_EXPERTS)]
