"""Names of the checkpoint's tensors, as data: parameter of the definition -> tensors joined by rows.

`{l}` is the layer, `{e}` the expert. Keys of layer parameters are relative to the layer.
"""

from __future__ import annotations

from moec.model_defs.names import Names, Stored

LAYER = "model.layers.{l}."
ATTN = LAYER + "self_attn."
EXPERT = LAYER + "mlp.experts.{e}."

TENSORS: Names = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "input_norm": (LAYER + "input_layernorm.weight",),
    "post_norm": (LAYER + "post_attention_layernorm.weight",),
    "attn.q": (ATTN + "q_proj.weight",),
    "attn.q_a": (ATTN + "q_a_proj.weight",),
    "attn.q_a_bias": (ATTN + "q_a_proj.bias",),
    "attn.q_norm": (ATTN + "q_a_layernorm.weight",),
    "attn.q_b": (ATTN + "q_b_proj.weight",),
    "attn.kv_a": (ATTN + "kv_a_proj_with_mqa.weight",),
    "attn.kv_a_bias": (ATTN + "kv_a_proj_with_mqa.bias",),
    "attn.kv_norm": (ATTN + "kv_a_layernorm.weight",),
    "attn.kv_b": (ATTN + "kv_b_proj.weight",),
    "attn.o": (ATTN + "o_proj.weight",),
    "attn.o_bias": (ATTN + "o_proj.bias",),
    "attn.indexer.q": (ATTN + "indexer.wq_b.weight",),
    "attn.indexer.k": (ATTN + "indexer.wk.weight",),
    "attn.indexer.k_norm": (ATTN + "indexer.k_norm.weight",),
    "attn.indexer.k_norm_bias": (ATTN + "indexer.k_norm.bias",),
    "attn.indexer.weights": (ATTN + "indexer.weights_proj.weight",),
    "mlp.gate_up": (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
    "mlp.down": (LAYER + "mlp.down_proj.weight",),
    "mlp.gate": (LAYER + "mlp.gate.weight",),
    "mlp.gate_bias": (LAYER + "mlp.gate.e_score_correction_bias",),
    "mlp.experts_gate_up": (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
    "mlp.experts_down": (EXPERT + "down_proj.weight",),
    "mlp.shared.gate_up": (LAYER + "mlp.shared_experts.gate_proj.weight", LAYER + "mlp.shared_experts.up_proj.weight"),
    "mlp.shared.down": (LAYER + "mlp.shared_experts.down_proj.weight",),
    # The multi-token-prediction module stands behind the last layer (arXiv 2412.19437, sec. 2.2).
    "enorm": (LAYER + "enorm.weight",),
    "hnorm": (LAYER + "hnorm.weight",),
    "e_proj": Stored((LAYER + "eh_proj.weight",), columns=(0, 2)),
    "h_proj": Stored((LAYER + "eh_proj.weight",), columns=(1, 2)),
    "mtp_norm": (LAYER + "shared_head.norm.weight",),
}
