"""Granite 3 MoE (IBM 2024): Mixtral's layers with constants on embedding, attention, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import LAYER, LLAMA, Names, Stored
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """Granite MoE; the gate's softmax is over the chosen logits, which is the softmax over all, normalised."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    scale = f.number("attention_multiplier", 1.0)
    attention = grouped(f, "linear", "dynamic", "yarn", "llama3", bias=bias, out_bias=bias, scale=scale)
    gate = Gate(f.size("num_experts_per_tok"), "softmax", normalise=True)
    experts = Experts(f.size("num_local_experts"), f.size("intermediate_size"), gate)
    return decoder(
        f,
        [Layer(attention, experts)] * layer_count(f),
        embed_scale=f.number("embedding_multiplier", 1.0),
        residual_scale=f.number("residual_multiplier", 1.0),
        logit_scale=1.0 / f.number("logits_scaling", 1.0),
    )


MOE = LAYER + "block_sparse_moe."
NAMES: Names = {
    **LLAMA,
    "mlp.gate": (MOE + "router.layer.weight",),
    "mlp.experts_gate_up": Stored((MOE + "input_linear.weight",), stacked=True),
    "mlp.experts_down": Stored((MOE + "output_linear.weight",), stacked=True),
}
FAMILIES = [Family("granitemoe", ("granitemoe",), read, NAMES)]
