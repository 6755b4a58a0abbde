"""gpt-oss (OpenAI 2025, arXiv 2508.10925): sinks, windows in every other layer, clamped SwiGLU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import FULL, SLIDING, decoder, grouped, layer_count, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import ATTN, LAYER, LLAMA, Names, Stored
from moec.model_defs.spec import Decoder, Experts, Gate, Layer


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """gpt-oss; the gate's softmax is over the chosen logits, which is the softmax over all, normalised."""
    count = Fields(raw, name).size("num_hidden_layers")
    kinds = raw.get("layer_types") or [SLIDING if i % 2 == 0 else FULL for i in range(count)]
    f = Fields({"sliding_window": 128, **raw, "layer_types": kinds}, name)
    bias = f.flag("attention_bias", True)
    attention = grouped(f, "yarn", "linear", theta=150000.0, bias=bias, out_bias=bias, sinks=True)
    gate = Gate(f.size("num_experts_per_tok", "experts_per_token"), "softmax", normalise=True, bias="logits")
    glu = (("limit", f.number("swiglu_limit", 7.0)), ("alpha", f.number("swiglu_alpha", 1.702)), ("shift", 1.0))
    experts = Experts(f.size("num_local_experts"), f.size("intermediate_size"), gate, bias=True, glu=glu)
    # Its clamped activation has silu's sigmoid built in.
    f.only("hidden_act", "silu")
    layers = [Layer(replace(attention, window=w), experts) for w in windows(f, layer_count(f))]
    return decoder(f, layers)


EXPERTS = LAYER + "mlp.experts."
NAMES: Names = {
    **LLAMA,
    "attn.sinks": (ATTN + "sinks",),
    "mlp.gate": (LAYER + "mlp.router.weight",),
    "mlp.gate_bias": (LAYER + "mlp.router.bias",),
    "mlp.experts_gate_up": Stored((EXPERTS + "gate_up_proj",), stacked=True, transposed=True, interleaved=True),
    "mlp.experts_gate_up_bias": Stored((EXPERTS + "gate_up_proj_bias",), stacked=True, interleaved=True),
    "mlp.experts_down": Stored((EXPERTS + "down_proj",), stacked=True, transposed=True),
    "mlp.experts_down_bias": Stored((EXPERTS + "down_proj_bias",), stacked=True),
}
FAMILIES = [Family("gpt_oss", ("gpt_oss",), read, NAMES)]
