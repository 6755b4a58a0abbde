"""Configuration of the DeepSeek-V2/V3 family, read from a Hugging Face `config.json` or a preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from moec.errors import near
from moec.model_defs.fields import ConfigError, is_integer, is_positive, shown
from moec.model_defs.rope import Rope, rope_of


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer: `top_k` positions are chosen by `heads` index heads of width `dim`."""

    top_k: int
    heads: int
    dim: int


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
    index: Indexer | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without positions and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache(self) -> tuple[str, int]:
        """Kind and width of the cache."""
        width = self.kv_lora_rank + self.qk_rope_head_dim
        return ("kv.latent", width) if self.index is None else ("kv.indexed", width + self.index.dim)

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores, YaRN's included."""
        return float(self.qk_head_dim**-0.5) * self.rope.softmax


IGNORED = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "ep_size", "head_dim", "id2label", "initializer_range",
        "label2id", "model_type", "name_or_path", "num_experts", "num_key_value_heads", "num_local_experts",
        "num_mtp_layers", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
        "problem_type", "qk_head_dim", "quantization_config", "return_dict", "rope_parameters", "rope_scaling",
        "rope_theta", "rope_type", "router_aux_loss_coef", "scoring_func", "seq_aux", "tf_legacy_loss", "topk_method",
        "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "use_cache",
    }
)  # fmt: skip
"""Fields that are read elsewhere below or do not change the mathematics of inference."""

ONLY: Mapping[str, Any] = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
    "use_mla": True,
}
"""Fields of which one value is supported."""

DEFAULTS = {
    "deepseek_v3": {"n_group": 8, "topk_group": 4, "rope_interleave": True, "norm_topk_prob": True},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "rope_interleave": True, "norm_topk_prob": False},
}
LARGEST = 1 << 18
"""Bound of every size, so that products of three stay within 64 bits; the vocabulary and positions may have more."""
LONG = {"vocab_size": 1 << 27, "max_position_embeddings": 1 << 27}
MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")

Fail = Callable[[str], ConfigError]


def from_hf(raw: Mapping[str, Any], name: str) -> Config:
    """The configuration of a `config.json`.

    Raises ConfigError naming the field that is missing, unknown, unsupported or of a wrong type. A field that this
    family does not know may be there with the value null: it is not used then.
    """

    def fail(message: str) -> ConfigError:
        return ConfigError(model=name, message=message)

    family = "deepseek_v2" if raw["model_type"] == "deepseek_v2" else "deepseek_v3"
    wanted = {f.name for f in fields(Config)} - {"model_type", "score", "group_score", "rope", "eos_token_ids", "index"}
    for key, value in raw.items():
        if value is not None and key not in wanted and key not in IGNORED and key not in ONLY:
            raise fail(f"field {key!r} is not known to this family{near(key, sorted(wanted))}")
    for key, only in ONLY.items():
        if raw.get(key) is not None and raw[key] != only:
            raise fail(f"{key} = {shown(raw[key])} is not supported, only {only!r}")
    values: dict[str, Any] = {"attention_bias": False, "tie_word_embeddings": False, "routed_scaling_factor": 1.0}
    values |= {"q_lora_rank": None, "num_nextn_predict_layers": raw.get("num_mtp_layers") or 0, "n_shared_experts": 0}
    values |= {"rms_norm_eps": 1e-6, "first_k_dense_replace": 0, **DEFAULTS[family]}
    values |= {k: v for k, v in raw.items() if k in wanted and v is not None}
    missing = sorted(wanted - set(values))
    if missing:
        raise fail(f"field {missing[0]!r} is missing")
    method = _given(raw, "topk_method", "noaux_tc" if family == "deepseek_v3" else "greedy")
    values |= _gate(family, method, raw, fail)
    if method == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    _check_types(values, fail)
    kinds = ("default", "linear", "yarn", "llama3")
    values["rope"] = rope_of(raw, values["max_position_embeddings"], fail, kinds=kinds)
    values["eos_token_ids"] = _eos(raw.get("eos_token_id"), fail)
    config = Config(model_type=raw["model_type"], **values)
    _check(config, fail)
    return config


def _gate(family: str, method: Any, raw: Mapping[str, Any], fail: Fail) -> dict[str, str]:
    score = _given(raw, "scoring_func", "sigmoid" if family == "deepseek_v3" else "softmax")
    known = {"noaux_tc": "top2", "greedy": "max", "group_limited_greedy": "max"}
    if not isinstance(method, str) or method not in known:
        raise fail(f"topk_method {shown(method)} is not supported{near(str(method), list(known))}")
    if score not in ("sigmoid", "softmax"):
        raise fail(f"scoring_func {shown(score)} is not supported, only sigmoid and softmax")
    return {"score": score, "group_score": known[method]}


def _given(raw: Mapping[str, Any], key: str, default: str) -> Any:
    value = raw.get(key)
    return default if value is None else value


def _eos(given: Any, fail: Fail) -> tuple[int, ...]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(is_integer(i) and i >= 0 for i in ids):
        raise fail(f"eos_token_id must be a token id or a list of them, got {shown(given)}")
    return tuple(ids)


def _check_types(values: Mapping[str, Any], fail: Fail) -> None:
    for f in fields(Config):
        if f.name not in values:
            continue
        value = values[f.name]
        if f.type == "int" or (f.type == "int | None" and value is not None):
            least, most = 0 if f.name in MAY_BE_ZERO else 1, LONG.get(f.name, LARGEST)
            if not is_integer(value) or value < least:
                sign = "an integer, 0 or more" if least == 0 else "a positive integer"
                raise fail(f"{f.name} must be {sign}, got {shown(value)}")
            if value > most:
                raise fail(f"{f.name} must be at most {most}, got {shown(value)}")
        elif f.type == "bool" and not isinstance(value, bool):
            raise fail(f"{f.name} must be true or false, got {shown(value)}")
        elif f.type == "float" and not is_positive(value):
            raise fail(f"{f.name} must be a positive number, got {shown(value)}")


def _check(c: Config, fail: Fail) -> None:
    if c.qk_rope_head_dim % 2:
        near = f"{c.qk_rope_head_dim - 1} or {c.qk_rope_head_dim + 1}"
        raise fail(f"qk_rope_head_dim must be even (rotary pairs), got {c.qk_rope_head_dim}; {near} would be")
    if c.n_routed_experts % c.n_group:
        raise fail(f"{c.n_routed_experts} experts do not divide into {c.n_group} groups")
    if c.topk_group > c.n_group:
        raise fail(f"topk_group {c.topk_group} exceeds the {c.n_group} groups of n_group")
    reach = c.topk_group * (c.n_routed_experts // c.n_group)
    if c.num_experts_per_tok > reach:
        raise fail(f"num_experts_per_tok {c.num_experts_per_tok} exceeds the {reach} experts of the chosen groups")
