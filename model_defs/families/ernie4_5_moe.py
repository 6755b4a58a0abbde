"""ERNIE 4.5 MoE (Baidu 2025): rotary pairs side by side, softmax gate with a bias on the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, dense, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import LAYER, QWEN_EXPERTS, Names, Stored
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """ERNIE 4.5: experts in the layers that start, end and interval name."""
    f = Fields(raw, name)
    count, bias = layer_count(f), f.flag("use_bias", False)
    attention = grouped(f, theta=500000.0, interleaved=True, bias=bias, out_bias=bias)
    gate = Gate(f.size("moe_k", "num_experts_per_tok"), "softmax", normalise=True, bias="choice")
    inter = f.size("moe_intermediate_size")
    shared = f.size("moe_num_shared_experts", default=0, least=0) * inter
    experts = Experts(f.size("moe_num_experts", "num_experts"), inter, gate, shared=shared, shared_bias=bias)
    first, step = f.size("moe_layer_start_index", default=1, least=0), f.size("moe_layer_interval", default=1)
    last = f.get("moe_layer_end_index")
    last = count - 1 if last in (None, -1) else f.size("moe_layer_end_index", least=0)
    plain = dense(f, bias)
    layers = [Layer(attention, experts if first <= i <= last and (i + 1) % step == 0 else plain) for i in range(count)]
    for key, value in (("moe_gate", "topk"), ("moe_use_aux_free", True), ("moe_gate_act", "softmax")):
        f.only(key, value)
    tied = f.flag("tie_word_embeddings", True)
    harmless = ("moe_norm_min", "moe_capacity", "moe_aux_loss_lambda", "num_nextn_predict_layers")
    eps = f.number("rms_norm_eps", 1e-5)
    return decoder(f, layers, harmless, eps=eps, tie_word_embeddings=tied, head_bias=bias)


NAMES: Names = {
    **QWEN_EXPERTS,
    "mlp.gate_bias": Stored((LAYER + "mlp.moe_statics.e_score_correction_bias",), row=True),
}
FAMILIES = [Family("ernie4_5_moe", ("ernie4_5_moe",), read, NAMES)]
