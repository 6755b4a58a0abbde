"""Small random models in Hugging Face layout, made with transformers, that span the variants of the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 152,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "no-query-rank": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "odd-sizes": {
        "hidden_size": 77, "intermediate_size": 131, "moe_intermediate_size": 29, "kv_lora_rank": 23, "q_lora_rank": 19,
        "num_attention_heads": 3, "num_key_value_heads": 3, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
        "v_head_dim": 14,
    },
    "yarn": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 1}},
    "half-split-rope": {"rope_interleave": False, "n_shared_experts": 2, "attention_bias": True},
    "all-dense": {"first_k_dense_replace": 3},
    "no-dense-tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True, "norm_topk_prob": False},
    "many-groups": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    "v2-lite": {"family": "v2", "q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None},
    "v2-groups": {"family": "v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "block-sizes": {
        "hidden_size": 256, "kv_lora_rank": 128, "q_lora_rank": 128, "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
    },
}  # fmt: skip


def make_model(name: str, seed: int = 0, **sizes: int) -> Any:
    """A transformers model of a variant with random weights of sensible size, in FP32."""
    settings = {**BASE, **VARIANTS[name], **sizes}
    v2 = settings.pop("family", "v3") == "v2"
    config_class = transformers.DeepseekV2Config if v2 else transformers.DeepseekV3Config
    model_class = transformers.DeepseekV2ForCausalLM if v2 else transformers.DeepseekV3ForCausalLM
    torch.manual_seed(seed)
    config = config_class(**settings)
    config._experts_implementation = "eager"
    model = model_class(config).eval().float()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "norm" in key:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.normal_(0, 0.1)
        for key, b in model.named_buffers():
            if "e_score_correction_bias" in key:
                b.normal_(0, 0.1)
    return model


def save_model(name: str, folder: Path, seed: int = 0) -> Any:
    """Write a variant as a Hugging Face folder and return the model."""
    model = make_model(name, seed)
    model.save_pretrained(folder)
    return model
