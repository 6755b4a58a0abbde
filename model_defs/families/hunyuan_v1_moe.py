"""Hunyuan-A13B (Tencent 2025): norms of query and key behind the rotation, a shared expert as wide as a routed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.model_defs.families.common import decoder, grouped, layer_count
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields, is_integer
from moec.model_defs.names import ATTN, LAYER, QWEN_EXPERTS, Names, swiglu
from moec.model_defs.spec import Decoder, Experts, Gate, Layer

ONLY: Mapping[str, Any] = {
    "kv_lora_rank": 0, "mlp_bias": False, "moe_layer_num_skipped": 0, "norm_topk_prob": True, "norm_type": "rms",
    "q_lora_rank": 0, "routed_scaling_factor": 1.0, "use_cla": False, "use_mla": False, "use_mixed_mlp_moe": True,
    "use_qk_norm": True, "use_rotary_pos_emb": True, "group_limited_greedy": False,
}  # fmt: skip
HARMLESS = (
    "add_classification_head", "capacity_factor", "cla_share_factor", "class_num", "dense_list", "ep_size",
    "mask_init_id", "moe_drop_tokens", "moe_random_routing_dropped_token", "num_media_embeds", "org_vocab_size",
    "pool_type", "text_end_id", "text_start_id",
)  # fmt: skip


def read(raw: Mapping[str, Any], name: str) -> Decoder:
    """Hunyuan: some numbers may be lists with an entry for each layer."""
    f = Fields(raw, name)
    count, bias = layer_count(f), f.flag("attention_bias", False)
    attention = grouped(f, "linear", "dynamic", bias=bias, out_bias=bias, norm="head", norm_after_rope=True)
    inter = _by_layer(f, "moe_intermediate_size", count, f.size("intermediate_size"))
    top_k, routed = _by_layer(f, "moe_topk", count, 1), _by_layer(f, "num_experts", count, 1)
    shared = _by_layer(f, "num_shared_expert", count, 1)
    layers = [
        Layer(attention, Experts(e, i, Gate(k, "softmax", normalise=True), shared=n * i))
        for e, i, k, n in zip(routed, inter, top_k, shared, strict=True)
    ]
    for key, value in ONLY.items():
        f.only(key, value)
    return decoder(f, layers, HARMLESS, eps=f.number("rms_norm_eps", 1e-5))


def _by_layer(f: Fields, key: str, count: int, default: int) -> list[int]:
    value = f.get(key)
    if isinstance(value, list):
        found = f.sizes(key)[:count]
        if len(found) != count or not all(found):
            raise f.fail(f"{key} must have a positive integer for each of {count} layers")
        return found
    return [f.size(key, default=default) if value is None or is_integer(value) else f.size(key)] * count


NAMES: Names = {
    **QWEN_EXPERTS,
    "attn.q_norm": (ATTN + "query_layernorm.weight",),
    "attn.k_norm": (ATTN + "key_layernorm.weight",),
    "mlp.gate": (LAYER + "mlp.gate.wg.weight",),
    **swiglu(LAYER + "mlp.shared_mlp.", "mlp.shared."),
}
FAMILIES = [Family("hunyuan_v1_moe", ("hunyuan_v1_moe",), read, NAMES)]
