"""Llama 4, text (Meta 2025): chunks of attention, layers without positions, weights on the experts' input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import LONG, Fields
from moec.model_defs.names import LAYER, LLAMA, Names, Stored, swiglu
from moec.model_defs.spec import Decoder, Dense, Experts, Gate, Layer, Temperature

KINDS = ("chunked_attention", "full_attention")


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """Llama 4: three layers of four have positions and see a chunk, the fourth has none and sees all."""
    f = Fields(raw, name)
    count, bias = layer_count(f), f.flag("attention_bias", False)
    interval = f.size("no_rope_layer_interval", default=4)
    turned = f.sizes("no_rope_layers", count) or [int((i + 1) % interval != 0) for i in range(count)]
    kinds = f.names("layer_types", count, KINDS) or [KINDS[0] if t else KINDS[1] for t in turned]
    chunk = f.size("attention_chunk_size", default=8192, most=LONG)
    tuned = bool(f.get("attn_temperature_tuning") is not False)
    heat = Temperature(f.number("floor_scale", 8192.0), f.number("attn_scale", 0.1))
    norm = "plain" if f.flag("use_qk_norm", True) else ""
    step = f.size("interleave_moe_layer_step", default=1)
    routed = f.sizes("moe_layers") or list(range(step - 1, count, step))
    inter = f.size("intermediate_size")
    gate = Gate(f.size("num_experts_per_tok", default=1), "sigmoid", normalise=False)
    experts = Experts(f.size("num_local_experts", default=16), inter, gate, shared=inter, weigh_input=True)
    plain = Dense(f.size("intermediate_size_mlp", default=16384))
    layers = []
    for i, (turns, kind) in enumerate(zip(turned, kinds, strict=True)):
        more: dict[str, Any] = {"norm": norm, "norm_after_rope": True} if turns else {"rope": None}
        more |= {"temperature": heat} if tuned and not turns else {}
        more |= {"chunk": chunk} if kind == KINDS[0] else {}
        attention = grouped(f, "llama3", "linear", theta=500000.0, interleaved=True, bias=bias, out_bias=bias, **more)
        layers.append(Layer(attention, experts if i in routed else plain))
    harmless = ("for_llm_compressor", "router_aux_loss_coef")
    return decoder(f, layers, harmless, eps=f.number("rms_norm_eps", 1e-5))


FEED = LAYER + "feed_forward."
NAMES: Names = {
    **LLAMA,
    **swiglu(FEED, "mlp."),
    "mlp.gate": (FEED + "router.weight",),
    "mlp.experts_gate_up": Stored((FEED + "experts.gate_up_proj",), stacked=True, transposed=True),
    "mlp.experts_down": Stored((FEED + "experts.down_proj",), stacked=True, transposed=True),
    **swiglu(FEED + "shared_expert.", "mlp.shared."),
}
FAMILIES = [Family("llama4_text", ("llama4_text",), read, NAMES)]
