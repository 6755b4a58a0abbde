"""What the configurations of most families have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moec.errors import near
from moec.model_defs.fields import LONG, Fields, shown
from moec.model_defs.rope import Rope
from moec.model_defs.spec import Attention, Decoder, Dense, Experts, Gate, Glu, Layer

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_count(f: Fields) -> int:
    """Layers of the model."""
    return f.size("num_hidden_layers")


def positions(f: Fields) -> int:
    """Positions that the model was made for."""
    return f.size("max_position_embeddings", most=LONG)


def grouped(f: Fields, *ropes: str, theta: float = 10000.0, interleaved: bool = False, **more: Any) -> Attention:
    """Grouped heads with a rotary embedding of one of the kinds `ropes`; `more`: further fields of the attention."""
    heads = f.size("num_attention_heads")
    hidden = f.size("hidden_size")
    dim = f.size("head_dim", "attention_head_dim", default=hidden // heads or 1)
    kv_heads = f.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise f.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    rope: Rope = f.rope(positions(f), dim, *ropes, theta=theta, interleaved=interleaved)
    given = {"scale": dim**-0.5, "rope": rope, **more}
    return Attention(heads, kv_heads, dim, **given)


def windows(f: Fields, count: int, always: bool = False) -> list[int]:
    """The window of every layer, 0 for none: by `layer_types`, else all layers where the family is `always` so."""
    window = f.size("sliding_window", default=0, least=0, most=LONG)
    used = f.flag("use_sliding_window", always)
    kinds = f.names("layer_types", count, (FULL, SLIDING))
    if kinds:
        if SLIDING in kinds and not window:
            raise f.fail("layer_types has sliding_attention, but sliding_window is missing")
        return [window if kind == SLIDING else 0 for kind in kinds]
    if not always and used and window:
        first = f.size("max_window_layers", default=0, least=0)
        return [window if i >= first else 0 for i in range(count)]
    return [window if used else 0] * count


def noaux_gate(f: Fields) -> Gate:
    """The gate of DeepSeek-V3 (arXiv 2412.19437, sec. 2.1.2): sigmoid, bias on the choice, groups."""
    gate = Gate(
        f.size("num_experts_per_tok"),
        "sigmoid",
        normalise=f.flag("norm_topk_prob", True),
        scale=f.number("routed_scaling_factor", 1.0),
        bias="choice",
        groups=f.size("n_group", default=1),
        top_groups=f.size("topk_group", default=1),
    )
    # The published dots.llm1 names its gate in both fields.
    f.only("scoring_func", "sigmoid", "noaux_tc")
    f.only("topk_method", "noaux_tc")
    return gate


def check_experts(f: Fields, m: Experts) -> Experts:
    """The experts, when their gate can choose as many as it should; raises ConfigError."""
    g = m.gate
    if m.count % g.groups:
        raise f.fail(f"{m.count} experts do not divide into {g.groups} groups")
    if g.top_groups > g.groups:
        raise f.fail(f"topk_group {g.top_groups} exceeds the {g.groups} groups of n_group")
    reach = g.top_groups * (m.count // g.groups)
    if g.top_k > reach:
        raise f.fail(f"num_experts_per_tok {g.top_k} exceeds the {reach} experts that can be chosen")
    return m


ACTIVATIONS = {
    "silu": "", "swish": "", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
"""Names of the gate's function in a `config.json`, and `act` of `swiglu`."""


def activation(f: Fields) -> Glu:
    """The function of the gates, where it is not silu."""
    name = f.get("hidden_act", "hidden_activation") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise f.fail(f"hidden_act {shown(name)} is not supported{near(str(name), list(ACTIVATIONS))}")
    return (("act", ACTIVATIONS[name]),) if ACTIVATIONS[name] else ()


def decoder(f: Fields, layers: Sequence[Layer], harmless: Sequence[str] = (), **more: Any) -> Decoder:
    """The decoder of all that was read; refuses what nothing has read. `more`: further fields of the decoder."""
    act = activation(f)
    layers = [replace(layer, feed=replace(layer.feed, glu=(*layer.feed.glu, *act))) for layer in layers]
    f.only("is_encoder_decoder", False)
    for layer in layers:
        if isinstance(layer.feed, Experts):
            check_experts(f, layer.feed)
    given = {
        "model_type": str(f.raw["model_type"]),
        "vocab_size": f.size("vocab_size", most=LONG),
        "hidden_size": f.size("hidden_size"),
        "max_position_embeddings": positions(f),
        "layers": tuple(layers),
        "eps": f.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": f.flag("tie_word_embeddings", False),
        "eos_token_ids": f.eos(),
        **more,
    }
    return Decoder(**given, ignored=f.finish(*harmless))


def dense(f: Fields, bias: bool = False) -> Dense:
    """The feed-forward of a dense layer."""
    return Dense(f.size("intermediate_size"), bias)
