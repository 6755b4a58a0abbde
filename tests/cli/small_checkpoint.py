"""A checkpoint of a few thousand parameters, written without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 4, "routed_scaling_factor": 1.5,
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "max_position_embeddings": 64,
    "hidden_act": "silu", "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "attention_bias": False, "num_nextn_predict_layers": 0, "eos_token_id": 1,
}  # fmt: skip
"""A model of one dense layer: all that the command line has to do, in few kernels."""

LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
    LAYER + "input_layernorm.weight": (16,),
    LAYER + "post_attention_layernorm.weight": (16,),
    LAYER + "self_attn.q_proj.weight": (24, 16),
    LAYER + "self_attn.kv_a_proj_with_mqa.weight": (12, 16),
    LAYER + "self_attn.kv_a_layernorm.weight": (8,),
    LAYER + "self_attn.kv_b_proj.weight": (32, 8),
    LAYER + "self_attn.o_proj.weight": (16, 16),
    LAYER + "mlp.gate_proj.weight": (24, 16),
    LAYER + "mlp.up_proj.weight": (24, 16),
    LAYER + "mlp.down_proj.weight": (16, 24),
}
OPTIONS = ("--recipe", "fp32", "--context", "32", "--chunk", "8")


def tensors() -> dict[str, torch.Tensor]:
    """The checkpoint of CONFIG, from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def write_model(folder: Path, config: Any = None, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """A Hugging Face folder with one shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    return folder
