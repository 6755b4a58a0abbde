"""The page about adding a model is run: its family loads a checkpoint that transformers made, to equal logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_configs import randomise
from test_families import evaluated

import moec
from moec.frontend.checkpoint import bind, open_checkpoint
from moec.model_defs import registry
from moec.model_defs.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def test_the_page_adds_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 100
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), space)
    family = space["FAMILY"]
    assert isinstance(family, Family)
    known = registry.families()
    monkeypatch.setattr(registry, "families", lambda: [*known, family])
    torch.manual_seed(3)
    config = transformers.StableLmConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_qkv_bias=True, partial_rotary_factor=0.5,
    )  # fmt: skip
    model = transformers.StableLmForCausalLM(config).eval().float()
    randomise(model)
    model.save_pretrained(tmp_path)
    traced, checkpoint = moec.trace(str(tmp_path)), open_checkpoint(tmp_path)
    assert bind(traced.ir, checkpoint) == []
    ids = torch.arange(30) * 7 % 61
    with torch.no_grad():
        expected = model(ids[None]).logits[0].numpy()
    got = evaluated(traced.ir, checkpoint.load, ids).numpy()
    assert np.abs(got - expected).max() / expected.std() < 5e-5
