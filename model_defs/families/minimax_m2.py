"""MiniMax-M2 (MiniMax 2025): norms over all heads together, a part of each head turned, DeepSeek-V3's gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import MIXTRAL_EXPERTS
from moec.model_defs.spec import Decoder, Experts, Gate, Layer

ONLY: Mapping[str, Any] = {
    "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "shared_intermediate_size": 0, "use_qk_norm": True,
    "use_routing_bias": True,
}  # fmt: skip
HARMLESS = (
    "attn_type_list", "layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta",
    "mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "shared_moe_mode", "use_mtp",
)  # fmt: skip


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """MiniMax-M2: `rotary_dim` of each head are turned."""
    f = Fields(raw, name)
    f.only("sliding_window", 0)
    dim, rotary = f.size("head_dim", default=128), f.size("rotary_dim", default=0, least=0)
    if rotary and "partial_rotary_factor" not in (raw.get("rope_parameters") or {}):
        f.raw = {**f.raw, "partial_rotary_factor": rotary / dim}
    attention = grouped(f, "linear", "yarn", theta=5e6, norm="wide")
    gate = Gate(f.size("num_experts_per_tok"), "sigmoid", normalise=True, bias="choice")
    experts = Experts(f.size("num_local_experts"), f.size("intermediate_size"), gate)
    for key, value in ONLY.items():
        f.only(key, value)
    return decoder(f, [Layer(attention, experts)] * layer_count(f), HARMLESS)


FAMILIES = [Family("minimax_m2", ("minimax_m2",), read, MIXTRAL_EXPERTS)]
