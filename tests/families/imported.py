"""Classes of transformers that are imported as modules nobody declared, and how far the import is from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from random_configs import make_model
from test_families import evaluated
from torch import nn

from moec.frontend.torch_import import TorchSource
from moec.stages import Traced

IMPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "dots1",
    "glm4_moe", "hunyuan_v1_moe", "minimax_m2", "gpt_oss", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "phimoe",
    "llama4_text",
)  # fmt: skip


def module_of(family: str, seed: int) -> Any:
    """A module whose experts are in a form that exports, and whose rotary embedding does not look at its input."""
    for number in range(seed, seed + 20):
        model = make_model(family, number)
        if model.config.rope_parameters["rope_type"] not in ("dynamic", "longrope"):
            break
    model.config._experts_implementation = "batched_mm"
    return model


def difference(traced: Traced, module: nn.Module, seed: int) -> float:
    """Greatest difference of the logits of 40 random tokens over their standard deviation."""
    source = traced.source
    assert isinstance(source, TorchSource)
    ids = torch.tensor(np.random.default_rng(seed).integers(0, source.config.vocab_size, 40))
    with torch.no_grad():
        given = module(ids[None])
    expected = (given if isinstance(given, torch.Tensor) else given.logits)[0]
    got = evaluated(traced.ir, lambda name, shape, dtype: source.tensors[name], ids)
    return float((got - expected).abs().max() / expected.std())
