"""Configuration of the DeepSeek-V2/V3 family, read from a Hugging Face `config.json` or a preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from moec.errors import InputError, near


class ConfigError(InputError):
    """A configuration that this family cannot express."""

    template: ClassVar[str] = "config of {model}: {message}"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: plain, or YaRN (Peng et al. 2023) when `factor` is above 1."""

    theta: float = 10000.0
    factor: float = 1.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    softmax: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Config:
    """Sizes and variants; names follow the family's `config.json`, `rope` and `gate` gather what is spread there."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_group: int
    topk_group: int
    score: str
    group_score: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_interleave: bool
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_nextn_predict_layers: int
    rope: Rope
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without positions and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores, YaRN's included."""
        return self.qk_head_dim**-0.5 * self.rope.softmax


IGNORED = frozenset(
    """architectures auto_map model_type torch_dtype dtype transformers_version use_cache initializer_range
    attention_dropout pad_token_id bos_token_id eos_token_id pretraining_tp aux_loss_alpha seq_aux ep_size
    moe_layer_freq num_key_value_heads head_dim qk_head_dim hidden_act scoring_func topk_method rope_theta rope_scaling
    rope_parameters quantization_config output_router_logits num_mtp_layers tf_legacy_loss return_dict
    output_hidden_states output_attentions torchscript mlp_bias is_encoder_decoder num_local_experts num_experts
    _name_or_path name_or_path chunk_size_feed_forward id2label label2id problem_type use_mla unsloth_fixed
    router_aux_loss_coef partial_rotary_factor rope_type attention_chunk_size cross_attention_hidden_size""".split()
)
"""Fields that are read elsewhere below or do not change the mathematics of inference."""

DEFAULTS = {
    "deepseek_v3": {"n_group": 8, "topk_group": 4, "rope_interleave": True, "norm_topk_prob": True},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "rope_interleave": True, "norm_topk_prob": False},
}


def from_hf(raw: Mapping[str, Any], name: str) -> Config:
    """The configuration of a `config.json`; raises ConfigError naming the field that is missing, unknown or unsupported."""

    def fail(message: str) -> ConfigError:
        return ConfigError(model=name, message=message)

    family = "deepseek_v2" if raw["model_type"] == "deepseek_v2" else "deepseek_v3"
    wanted = {f.name for f in fields(Config)} - {"model_type", "score", "group_score", "rope", "eos_token_ids"}
    for key in raw:
        if key not in wanted and key not in IGNORED:
            raise fail(f"field {key!r} is not known to this family{near(key, sorted(wanted))}")
    for key, only in (("hidden_act", "silu"), ("mlp_bias", False), ("moe_layer_freq", 1), ("pretraining_tp", 1)):
        if raw.get(key, only) != only:
            raise fail(f"{key} = {raw[key]!r} is not supported, only {only!r}")
    values: dict[str, Any] = {"attention_bias": False, "tie_word_embeddings": False, "routed_scaling_factor": 1.0}
    values |= {"q_lora_rank": None, "num_nextn_predict_layers": raw.get("num_mtp_layers", 0), "n_shared_experts": 0}
    values |= {"rms_norm_eps": 1e-6, "first_k_dense_replace": 0, **DEFAULTS[family]}
    values |= {k: v for k, v in raw.items() if k in wanted and (v is not None or k == "q_lora_rank")}
    missing = sorted(wanted - set(values))
    if missing:
        raise fail(f"field {missing[0]!r} is missing")
    method = raw.get("topk_method", "noaux_tc" if family == "deepseek_v3" else "greedy")
    values |= _gate(family, method, raw, fail)
    if method == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    values["rope"] = _rope(raw, values, fail)
    eos = raw.get("eos_token_id")
    values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    config = Config(model_type=raw["model_type"], **values)
    _check(config, fail)
    return config


def _gate(family: str, method: str, raw: Mapping[str, Any], fail: Any) -> dict[str, str]:
    score = raw.get("scoring_func", "sigmoid" if family == "deepseek_v3" else "softmax")
    known = {"noaux_tc": "top2", "greedy": "max", "group_limited_greedy": "max"}
    if method not in known:
        raise fail(f"topk_method {method!r} is not supported{near(method, list(known))}")
    if score not in ("sigmoid", "softmax"):
        raise fail(f"scoring_func {score!r} is not supported, only sigmoid and softmax")
    return {"score": score, "group_score": known[method]}


def _rope(raw: Mapping[str, Any], values: Mapping[str, Any], fail: Any) -> Rope:
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise fail(f"rope type {kind!r} is not supported, only default and yarn")
    known = {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "truncate", "partial_rotary_factor",
    }  # fmt: skip
    for key in given:
        if key not in known:
            raise fail(f"rope field {key!r} is not known{near(key, sorted(known))}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise fail("partial_rotary_factor other than 1 is not supported")
    original = int(given.get("original_max_position_embeddings") or values["max_position_embeddings"])
    factor = float(given.get("factor") or values["max_position_embeddings"] / original)
    m, m_all = given.get("mscale"), given.get("mscale_all_dim")
    attention = given.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1.0)
    return Rope(
        theta=theta,
        factor=factor,
        original=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        attention=float(attention),
        softmax=_mscale(factor, m_all) ** 2 if m_all else 1.0,
        truncate=bool(given.get("truncate", True)),
    )


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _check(c: Config, fail: Any) -> None:
    for f in fields(Config):
        value = getattr(c, f.name)
        if f.type == "int" and f.name not in ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise fail(f"{f.name} must be a positive integer, got {value!r}")
    if c.qk_rope_head_dim % 2:
        raise fail(f"qk_rope_head_dim must be even (rotary pairs), got {c.qk_rope_head_dim}")
    if c.n_routed_experts % c.n_group:
        raise fail(f"{c.n_routed_experts} experts do not divide into {c.n_group} groups")
    reach = c.topk_group * (c.n_routed_experts // c.n_group)
    if c.topk_group > c.n_group or c.num_experts_per_tok > reach:
        raise fail(f"num_experts_per_tok {c.num_experts_per_tok} exceeds the {reach} experts of the chosen groups")
