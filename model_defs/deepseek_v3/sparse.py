"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 that attends to the positions that the lightning indexer chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.deepseek_v3.config import Config, Indexer, from_hf
from moec.model_defs.fields import Fields

INDEXER = ("index_topk", "index_n_heads", "index_head_dim")


def read(raw: Mapping[str, Any], name: str) -> Config:
    """The configuration; raises ConfigError.

    The published code rotates index queries and keys by a Hadamard matrix before it rounds them to FP8, which leaves
    their products as they are; here they are not rounded.
    """
    f = Fields(raw, name)
    sizes = zip(INDEXER, (2048, 64, 128), (1 << 27, 1 << 18, 1 << 18), strict=True)
    index = Indexer(*(f.size(key, default=default, most=most) for key, default, most in sizes))
    count, dense = f.size("num_hidden_layers"), f.size("first_k_dense_replace", default=0, least=0)
    f.names("layer_types", count, ("indexed_attention",))
    kinds = f.names("mlp_layer_types", count, ("dense", "sparse"))
    expected = ["dense" if i < dense else "sparse" for i in range(count)]
    if kinds and kinds != expected:
        raise f.fail("mlp_layer_types: dense layers other than the first are not supported")
    rest = {k: v for k, v in raw.items() if k not in (*INDEXER, "layer_types", "mlp_layer_types")}
    config = from_hf(rest, name)
    if config.q_lora_rank is None:
        raise f.fail("field 'q_lora_rank' is missing: the indexer reads the compressed query")
    if config.qk_rope_head_dim > index.dim:
        raise f.fail(f"index_head_dim {index.dim} must hold the {config.qk_rope_head_dim} of qk_rope_head_dim")
    return replace(config, index=index)
