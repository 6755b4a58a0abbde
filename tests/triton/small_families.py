"""Small models of the families with heads of keys and values, as changes to a preset's configuration."""

from __future__ import annotations

SMALL = {"hidden_size": "64", "intermediate_size": "48", "num_hidden_layers": "2", "num_attention_heads": "4",
         "num_key_value_heads": "2", "vocab_size": "96"}  # fmt: skip
HEAD = {"head_dim": "16"}
EXPERTS = {"moe_intermediate_size": "32", "num_experts": "4", "num_experts_per_tok": "2"}
SPECIAL: dict[str, dict[str, str]] = {
    "mixtral-8x7b": {"num_local_experts": "4", "sliding_window": "4"},
    "qwen3-30b-a3b": {**EXPERTS, **HEAD},
    "gpt-oss-20b": {**HEAD, "num_local_experts": "4", "num_experts_per_tok": "2", "sliding_window": "4"},
    "llama-4-scout": {**HEAD, "num_local_experts": "4", "intermediate_size_mlp": "48", "attention_chunk_size": "4",
                      "num_hidden_layers": "4"},
    "phi-3.5-moe": {"num_local_experts": "4"},
    "glm-4.5-air": {**HEAD, "n_routed_experts": "4", "moe_intermediate_size": "32", "num_experts_per_tok": "2"},
    "qwen1.5-moe-a2.7b": {**EXPERTS, "shared_expert_intermediate_size": "48"},
    "granite-3.0-1b-a400m": {"num_local_experts": "4", "num_experts_per_tok": "2"},
    "hunyuan-a13b": {**HEAD, "num_experts": "4", "moe_topk": "2", "moe_intermediate_size": "48"},
    "llama-3.2-1b": {},
}  # fmt: skip
FAMILIES = {name: {**SMALL, **settings} for name, settings in SPECIAL.items()}
