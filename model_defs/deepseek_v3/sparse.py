"""DeepSeek-V3.2 (arXiv 2512.02556) up to `index_topk` positions, where its sparse attention is the plain one.

The lightning indexer chooses `index_topk` positions for each token. With no more positions than that it chooses all,
and the model is DeepSeek-V3 exactly; longer contexts would need the indexer, and are refused with the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moec.model_defs.deepseek_v3.config import Config, from_hf
from moec.model_defs.fields import Fields

INDEXER = ("index_topk", "index_n_heads", "index_head_dim")


def read(raw: Mapping[str, Any], name: str) -> Config:
    """The configuration, with as many positions as the indexer would choose; raises ConfigError."""
    f = Fields(raw, name)
    top_k = f.size("index_topk", default=2048, most=1 << 27)
    for key in INDEXER[1:]:
        f.size(key, default=1)
    count, dense = f.size("num_hidden_layers"), f.size("first_k_dense_replace", default=0, least=0)
    f.names("layer_types", count, ("indexed_attention",))
    kinds = f.names("mlp_layer_types", count, ("dense", "sparse"))
    expected = ["dense" if i < dense else "sparse" for i in range(count)]
    if kinds and kinds != expected:
        raise f.fail("mlp_layer_types: dense layers other than the first are not supported")
    rest = {k: v for k, v in raw.items() if k not in (*INDEXER, "layer_types", "mlp_layer_types")}
    config = from_hf(rest, name)
    return replace(config, max_position_embeddings=min(config.max_position_embeddings, top_k))
