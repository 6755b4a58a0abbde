"""Small random configurations and models of every family, drawn from a seed, made with transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Draw = Callable[[random.Random], dict[str, Any]]
POSITIONS = 96


def base(r: random.Random) -> dict[str, Any]:
    """What every configuration has: odd sizes, groups of heads, two to four layers."""
    kv = r.choice([1, 2, 4])
    return {
        "vocab_size": r.choice([61, 97, 128]),
        "hidden_size": r.choice([32, 48]),
        "intermediate_size": r.choice([24, 44, 56]),
        "num_hidden_layers": r.choice([2, 3, 4]),
        "num_attention_heads": kv * r.choice([1, 2, 4]),
        "num_key_value_heads": kv,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": r.choice([1e-6, 1e-5]),
        "tie_word_embeddings": r.random() < 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": r.choice([1e4, 5e5])},
    }


def dims(r: random.Random) -> dict[str, Any]:
    """A head width that need not be hidden / heads."""
    return {"head_dim": r.choice([8, 12, 16])}


def whole_heads(r: random.Random) -> dict[str, Any]:
    """Heads that make up the hidden width."""
    heads = r.choice([2, 4])
    return {"hidden_size": heads * r.choice([8, 12]), "num_attention_heads": heads, "num_key_value_heads": heads // 2}


def experts(r: random.Random, key: str) -> dict[str, Any]:
    count = r.choice([4, 6, 8])
    return {key: count, "num_experts_per_tok": r.choice([1, 2, 3])}


def act(r: random.Random) -> dict[str, Any]:
    """The function of the gates."""
    return {"hidden_act": r.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"])}


def scaled_rope(r: random.Random) -> dict[str, Any]:
    """One of the kinds of rotary embedding."""
    theta = r.choice([1e4, 5e5])
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    ]  # fmt: skip
    return {"rope_parameters": {**r.choice(kinds), "rope_theta": theta}}


def noaux(r: random.Random, layers: int) -> dict[str, Any]:
    groups = r.choice([1, 2])
    return {
        "n_routed_experts": 8,
        "num_experts_per_tok": r.choice([2, 3]),
        "moe_intermediate_size": r.choice([16, 20]),
        "n_shared_experts": r.choice([1, 2]),
        "n_group": groups,
        "topk_group": 1,
        "first_k_dense_replace": r.randrange(layers),
        "routed_scaling_factor": r.choice([1.0, 2.5]),
        "norm_topk_prob": r.random() < 0.7,
    }


def llama(r: random.Random) -> dict[str, Any]:
    return (
        act(r) | base(r) | dims(r) | scaled_rope(r) | {"attention_bias": r.random() < 0.5, "mlp_bias": r.random() < 0.5}
    )


def mistral(r: random.Random) -> dict[str, Any]:
    return base(r) | dims(r) | scaled_rope(r) | {"sliding_window": r.choice([None, 7, 20])}


def qwen2(r: random.Random) -> dict[str, Any]:
    c = base(r) | whole_heads(r) | scaled_rope(r)
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": r.choice([0, 1, 2])}
    return c | r.choice([{}, window])


def qwen3(r: random.Random) -> dict[str, Any]:
    return base(r) | dims(r) | scaled_rope(r) | {"attention_bias": r.random() < 0.5}


def mixtral(r: random.Random) -> dict[str, Any]:
    return act(r) | base(r) | dims(r) | experts(r, "num_local_experts") | {"sliding_window": r.choice([None, 7, 20])}


def qwen2_moe(r: random.Random) -> dict[str, Any]:
    c = base(r) | whole_heads(r) | experts(r, "num_experts")
    sparse: dict[str, Any] = r.choice([{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, {"mlp_only_layers": []}])
    return act(r) | c | sparse | {
        "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "qkv_bias": r.random() < 0.7,
        "norm_topk_prob": r.random() < 0.5,
    }  # fmt: skip


def qwen3_moe(r: random.Random) -> dict[str, Any]:
    more = {"moe_intermediate_size": 20, "norm_topk_prob": r.random() < 0.5, "mlp_only_layers": r.choice([[], [0]])}
    return base(r) | dims(r) | scaled_rope(r) | experts(r, "num_experts") | more


def glm4_moe(r: random.Random) -> dict[str, Any]:
    c = base(r) | {"head_dim": 16}
    c["rope_parameters"] |= {"partial_rotary_factor": r.choice([0.5, 0.25])}
    return c | noaux(r, c["num_hidden_layers"]) | {"use_qk_norm": r.random() < 0.5, "attention_bias": r.random() < 0.5}


def dots1(r: random.Random) -> dict[str, Any]:
    c = base(r) | dims(r)
    kinds = [r.choice(["full_attention", "sliding_attention"]) for _ in range(c["num_hidden_layers"])]
    return act(r) | c | noaux(r, c["num_hidden_layers"]) | {"layer_types": kinds, "sliding_window": 9}


def gpt_oss(r: random.Random) -> dict[str, Any]:
    c = base(r) | dims(r) | experts(r, "num_local_experts")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "truncate": False}
    return c | {
        "sliding_window": r.choice([6, 17]), "rope_parameters": {**yarn, "rope_theta": 150000.0},
        "swiglu_limit": r.choice([0.5, 7.0]),
    }  # fmt: skip


def olmoe(r: random.Random) -> dict[str, Any]:
    clip = r.choice([None, 1.5])
    return base(r) | whole_heads(r) | experts(r, "num_experts") | {
        "norm_topk_prob": r.random() < 0.5, "clip_qkv": clip, "eos_token_id": 1,
    }  # fmt: skip


def phimoe(r: random.Random) -> dict[str, Any]:
    c = base(r) | whole_heads(r) | {"num_local_experts": r.choice([4, 8]), "num_experts_per_tok": 2}
    half = c["hidden_size"] // c["num_attention_heads"] // 2
    long = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": POSITIONS,
        "short_factor": [1.0 + 0.1 * i for i in range(half)], "long_factor": [2.0 + 0.5 * i for i in range(half)],
        "short_mscale": 1.2, "long_mscale": 1.1,
    }  # fmt: skip
    rope = r.choice([{}, {"rope_parameters": long}])
    more = {"attention_bias": r.random() < 0.5, "lm_head_bias": r.random() < 0.5, "router_jitter_noise": 0.3}
    return act(r) | c | rope | more


def granitemoe(r: random.Random) -> dict[str, Any]:
    return act(r) | base(r) | whole_heads(r) | experts(r, "num_local_experts") | {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5,
        "attention_bias": r.random() < 0.5,
    }  # fmt: skip


def ernie(r: random.Random) -> dict[str, Any]:
    c = base(r) | whole_heads(r)
    return act(r) | c | {
        "moe_num_experts": 6, "moe_k": r.choice([1, 2]), "moe_intermediate_size": 20,
        "moe_num_shared_experts": r.choice([0, 1, 2]), "moe_layer_start_index": r.choice([0, 1]),
        "moe_layer_interval": r.choice([1, 2]), "use_bias": r.random() < 0.5,
        "moe_layer_end_index": c["num_hidden_layers"] - 1,
    }  # fmt: skip


def hunyuan(r: random.Random) -> dict[str, Any]:
    alpha = {"rope_type": "dynamic", "alpha": 20.0, "rope_theta": 1e4, "factor": 1.0}
    rope = r.choice([{}, {"rope_parameters": alpha}])
    bias = {"attention_bias": r.random() < 0.5}
    return base(r) | dims(r) | rope | bias | {"num_experts": r.choice([4, 6]), "moe_topk": r.choice([1, 2])}


def llama4(r: random.Random) -> dict[str, Any]:
    return base(r) | dims(r) | {
        "num_hidden_layers": r.choice([3, 4]), "num_local_experts": r.choice([4, 6]),
        "num_experts_per_tok": r.choice([1, 2]), "intermediate_size_mlp": 36,
        "attention_chunk_size": r.choice([10, 24]), "no_rope_layer_interval": r.choice([2, 3]),
        "interleave_moe_layer_step": r.choice([1, 2]), "floor_scale": 8, "attn_scale": 0.3,
        "attn_temperature_tuning": r.random() < 0.7, "use_qk_norm": r.random() < 0.7,
    }  # fmt: skip


def minimax(r: random.Random) -> dict[str, Any]:
    c = base(r) | {"head_dim": 16, "rotary_dim": r.choice([8, 16])} | experts(r, "num_local_experts")
    c["rope_parameters"] |= {"partial_rotary_factor": c["rotary_dim"] / 16}
    return act(r) | c


def latent(r: random.Random) -> dict[str, Any]:
    """Multi-head latent attention, with the query compressed or not."""
    heads = r.choice([2, 3, 4])
    return base(r) | {
        "num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": r.choice([16, 23, 32]),
        "q_lora_rank": r.choice([None, 19, 24]), "qk_rope_head_dim": r.choice([4, 6, 8]),
        "qk_nope_head_dim": r.choice([10, 12, 16]), "v_head_dim": r.choice([12, 14, 20]),
    }  # fmt: skip


def yarn(r: random.Random) -> dict[str, Any]:
    """DeepSeek's rotary embedding for more positions, the plain one, or that of other families."""
    long = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 1.0,
        "mscale_all_dim": r.choice([0.8, 1.0]), "beta_fast": 16, "beta_slow": 1,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    }  # fmt: skip
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
    return r.choice([{}, *({"rope_parameters": kind} for kind in (long, long, linear, llama3))])


def deepseek_v2(r: random.Random) -> dict[str, Any]:
    c = latent(r)
    groups: dict[str, Any] = r.choice([
        {"topk_method": "greedy", "n_group": None, "topk_group": None},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ])  # fmt: skip
    # transformers views pairs of the joined projection as complex numbers, and wants heads to divide the width.
    heads = r.choice([2, 4])
    even = {"kv_lora_rank": r.choice([16, 22, 32]), "num_attention_heads": heads, "num_key_value_heads": heads}
    return c | yarn(r) | noaux(r, c["num_hidden_layers"]) | groups | even | {"norm_topk_prob": False}


def deepseek_v3(r: random.Random) -> dict[str, Any]:
    c = latent(r)
    turned = {"rope_interleave": r.random() < 0.7, "attention_bias": r.random() < 0.3}
    return c | yarn(r) | noaux(r, c["num_hidden_layers"]) | turned


def deepseek_v32(r: random.Random) -> dict[str, Any]:
    """Sparse attention of fewer positions than the tests have; with many index heads, scores do not tie at 0."""
    c = latent(r) | {"q_lora_rank": r.choice([19, 24]), "attention_bias": False}
    index = {
        "index_topk": r.choice([5, 16, 40]),
        "index_n_heads": r.choice([12, 16]),
        "index_head_dim": r.choice([8, 20]),
    }
    return c | yarn(r) | noaux(r, c["num_hidden_layers"]) | index


FAMILIES: dict[str, tuple[str, Draw]] = {
    "deepseek_v2": ("DeepseekV2", deepseek_v2),
    "deepseek_v3": ("DeepseekV3", deepseek_v3),
    "deepseek_v32": ("DeepseekV32", deepseek_v32),
    "mistral": ("Mistral", mistral),
    "qwen2": ("Qwen2", qwen2),
    "llama": ("Llama", llama),
    "qwen3": ("Qwen3", qwen3),
    "mixtral": ("Mixtral", mixtral),
    "qwen2_moe": ("Qwen2Moe", qwen2_moe),
    "qwen3_moe": ("Qwen3Moe", qwen3_moe),
    "glm4_moe": ("Glm4Moe", glm4_moe),
    "dots1": ("Dots1", dots1),
    "gpt_oss": ("GptOss", gpt_oss),
    "olmoe": ("Olmoe", olmoe),
    "phimoe": ("Phimoe", phimoe),
    "granitemoe": ("GraniteMoe", granitemoe),
    "ernie4_5_moe": ("Ernie4_5_Moe", ernie),
    "hunyuan_v1_moe": ("HunYuanMoEV1", hunyuan),
    "llama4_text": ("Llama4", llama4),
    "minimax_m2": ("MiniMaxM2", minimax),
}
"""Model type -> the classes' name in transformers, and how a configuration is drawn."""


def make_model(family: str, seed: int, **sizes: int) -> Any:
    """A transformers model of a configuration drawn from `seed`, FP32, with weights of sensible size."""
    name, draw = FAMILIES[family]
    settings = draw(random.Random(f"{family} {seed}")) | sizes
    config_class = getattr(transformers, f"{name}{'TextConfig' if family == 'llama4_text' else 'Config'}")
    config = config_class(**settings)
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    randomise(model)
    return model


def randomise(model: Any) -> None:
    """Weights that keep the size of what goes through them; norms near 1, biases and sinks that count."""
    with torch.no_grad():
        for key, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            if p.ndim > 1 and not key.endswith(("bias", "e_score_correction_bias")):
                p.normal_(0, 1 if "embed" in key else p.shape[-1] ** -0.5)
            elif "norm" in key and key.endswith("weight"):
                p.copy_(1 + 0.1 * torch.randn_like(p))
            else:
                p.normal_(0, 0.2)


def save_model(family: str, seed: int, folder: Path) -> Any:
    """Write such a model as a Hugging Face folder and return it."""
    model = make_model(family, seed)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model
