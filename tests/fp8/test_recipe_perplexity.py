"""What recipes cost the trained model in perplexity on held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moec
from moec.model_defs.registry import preset_folder

RECIPES = {
    "fp32": "recipe=fp32",
    "bf16": "recipe=bf16",
    "deepseek-v3": "recipe=deepseek-v3",
    "FP8 cache": "recipe=deepseek-v3,cache=fp8",
    "weight-only": "recipe=weight-only",
    "per-tensor": "recipe=per-tensor",
    "per-channel": "recipe=per-channel",
    "powers of two": "recipe=deepseek-v3,scale=ue8m0",
}


@pytest.mark.slow
def test_recipes_stay_within_half_a_percent_of_bf16(tmp_path: Path) -> None:
    from moec.runtime.perplexity import score_text

    folder = preset_folder("tiny-deepseek-v3")
    assert folder is not None
    text = (folder / "heldout.txt").read_text()
    found = {}
    for name, options in RECIPES.items():
        plan = moec.trace("tiny-deepseek-v3").optimize("cpu", context=512, passes=[f"fp8-cast{{{options}}}"])
        model = moec.load(plan.compile(tmp_path / f"{name}.moec").path)
        found[name] = score_text(model, text).perplexity
    base = found["bf16"]
    print(json.dumps({name: round(p, 4) for name, p in found.items()}))
    assert all(abs(p / base - 1) < 0.005 for p in found.values()), json.dumps(found)
