"""DeepSeek-V3.2 of sizes that matrix tiles take, from BF16 caches: against V3 where all is chosen, and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_configs import make_model

import moec

pytestmark = pytest.mark.slow
SIZES = {
    "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 32, "vocab_size": 128,
    "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
INDEX = {"index_n_heads": 16, "index_head_dim": 64}


def compiled(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "hf")
    plan = moec.trace(str(folder / "hf")).optimize("cpu", batch=1, context=256, chunk=128, recipe="bf16")
    return moec.load(plan.compile(folder / "m.moec").path)


def test_an_indexer_that_chooses_all_positions_gives_v3(seed: int, tmp_path: Path) -> None:
    """The same weights, absorbed alike or not: the roundings of BF16 are apart."""
    sparse = make_model("deepseek_v32", seed, **SIZES, **INDEX, index_topk=256)
    dense = make_model("deepseek_v3", seed, **SIZES)
    state = sparse.state_dict()
    dense.config.rope_parameters = sparse.config.rope_parameters
    dense.config.norm_topk_prob, dense.config.rope_interleave = sparse.config.norm_topk_prob, True
    dense.config.attention_bias = False
    for key in ("routed_scaling_factor", "n_shared_experts", "rms_norm_eps", "tie_word_embeddings"):
        setattr(dense.config, key, getattr(sparse.config, key))
    dense = type(dense)(dense.config).eval().float()
    dense.load_state_dict({k: v for k, v in state.items() if "indexer" not in k})
    ids = np.random.default_rng(seed).integers(0, 128, (1, 100))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = compiled(sparse, tmp_path / "a"), compiled(dense, tmp_path / "b")
    ours, theirs = ours.logits(ids, chunk=1), theirs.logits(ids, chunk=1)
    assert np.median(np.abs(ours - theirs)) / theirs.std() < 0.01


def test_chosen_positions_from_a_bf16_cache(seed: int, tmp_path: Path) -> None:
    """A position that rounding lets in or keeps out moves a token's logits: the median over tokens counts."""
    model = make_model("deepseek_v32", seed, **SIZES, **INDEX, index_topk=80)
    ids = np.random.default_rng(seed).integers(0, 128, (1, 200))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits[0].numpy()
    artifact = compiled(model, tmp_path)
    for chunk in (None, 1):
        moved = np.sqrt(((artifact.logits(ids, chunk=chunk)[0] - expected) ** 2).mean(-1)) / expected.std()
        assert np.median(moved[80:]) < 0.05
