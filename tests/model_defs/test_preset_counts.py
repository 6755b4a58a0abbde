"""Parameters of every preset against those of the same configuration in transformers, built without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moec.cli.models import model_facts
from moec.model_defs.registry import preset_config, preset_names

SAME = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers has under another name."""


def model_of(name: str) -> Any:
    """The class of a preset's `model_type` on the meta device: shapes and no data."""
    raw = preset_config(name)
    kind = raw.pop("model_type")
    config = transformers.AutoConfig.for_model(SAME.get(kind, kind), **raw)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def counts(model: Any) -> tuple[int, int]:
    """Parameters in all, and those that a token goes through: of routed experts as many as it chooses.

    Biases of the choice are kept as buffers that are saved. Tied matrices count once.
    """
    config, total, idle = model.config, 0, 0
    keys = ("num_experts_per_tok", "moe_k", "moe_topk", "num_hidden_layers")
    chosen = next(getattr(config, key) for key in keys if hasattr(config, key))
    stacks = (".experts.", ".block_sparse_moe.input_linear", ".block_sparse_moe.output_linear")
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        total += tensor.numel()
        if any(name in key for name in stacks):
            many = tensor.shape[0]
            per_token = max(chosen) if isinstance(chosen, list) else chosen
            idle += tensor.numel() // many * (many - per_token)
    return total, total - idle


@pytest.mark.parametrize("name", preset_names())
def test_counts_equal_transformers(name: str) -> None:
    facts = model_facts(name)
    assert (facts["parameters"], facts["active_parameters"]) == counts(model_of(name))
