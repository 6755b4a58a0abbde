"""Dense decoders: Llama 2 and 3 (arXiv 2407.21783), Mistral, Qwen2 (2407.10671) and Qwen3 (2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.families.common import decoder, dense, grouped, layer_count, windows
from moec.model_defs.family import Family
from moec.model_defs.fields import Fields
from moec.model_defs.names import LLAMA
from moec.model_defs.spec import Attention, Decoder, Layer

ROPES = ("linear", "dynamic", "llama3", "yarn")


def read_llama(raw: Mapping[str, Any], name: str) -> Decoder:
    """Llama: biases where the configuration has them."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    return _dense(f, grouped(f, *ROPES, bias=bias, out_bias=bias), [0] * layer_count(f))


def read_mistral(raw: Mapping[str, Any], name: str) -> Decoder:
    """Mistral: Llama with a window."""
    f = Fields(raw, name)
    return _dense(f, grouped(f, *ROPES), windows(f, layer_count(f), always=True))


def read_qwen2(raw: Mapping[str, Any], name: str) -> Decoder:
    """Qwen2: biases on query, key and value."""
    f = Fields(raw, name)
    return _dense(f, grouped(f, *ROPES, bias=True), windows(f, layer_count(f)))


def read_qwen3(raw: Mapping[str, Any], name: str) -> Decoder:
    """Qwen3: norms of each head of query and key."""
    f = Fields(raw, name)
    bias = f.flag("attention_bias", False)
    attention = grouped(f, *ROPES, bias=bias, out_bias=bias, norm="head")
    return _dense(f, attention, windows(f, layer_count(f)))


def _dense(f: Fields, attention: Attention, window: list[int]) -> Decoder:
    feed = dense(f, f.flag("mlp_bias", False))
    return decoder(f, [Layer(replace(attention, window=w), feed) for w in window])


FAMILIES = [
    Family("llama", ("llama",), read_llama, LLAMA),
    Family("mistral", ("mistral",), read_mistral, LLAMA),
    Family("qwen2", ("qwen2",), read_qwen2, LLAMA),
    Family("qwen3", ("qwen3",), read_qwen3, LLAMA),
]
