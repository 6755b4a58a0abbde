"""Parameters of the presets against those that their publishers state, and the cache's bytes by hand."""

from __future__ import annotations

import pytest

from moec.cli.models import model_facts
from moec.model_defs.registry import preset_names

PUBLISHED = {
    "deepseek-v2": (236e9, 21e9), "deepseek-v2-lite": (15.7e9, 2.66e9), "deepseek-v3": (671e9, 37e9),
    "deepseek-v3.2": (671.9e9, 37.4e9),
    "dots.llm1": (142e9, 14e9), "ernie-4.5-21b-a3b": (21.9e9, 3.3e9), "ernie-4.5-300b-a47b": (300e9, 47e9),
    "glm-4.5": (353e9, 32e9), "glm-4.5-air": (106e9, 12.8e9), "gpt-oss-120b": (116.83e9, 5.71e9),
    "gpt-oss-20b": (20.91e9, 4.19e9), "granite-3.0-1b-a400m": (1.33e9, 0.43e9), "granite-3.0-3b-a800m": (3.3e9, 0.88e9),
    "hunyuan-a13b": (80e9, 13e9), "kimi-k2": (1026e9, 32.6e9), "llama-3.1-8b": (8.03e9, 8.03e9),
    "llama-3.2-1b": (1.24e9, 1.24e9), "llama-4-maverick": (400e9, 17e9), "llama-4-scout": (108e9, 17e9),
    "minimax-m2": (229e9, 10.6e9), "mixtral-8x22b": (140.6e9, 39.1e9), "mixtral-8x7b": (46.7e9, 12.9e9),
    "moonlight-16b": (15.96e9, 2.9e9), "olmoe-1b-7b": (6.92e9, 1.28e9), "phi-3.5-moe": (41.9e9, 6.6e9),
    "qwen1.5-moe-a2.7b": (14.3e9, 2.7e9), "qwen2-57b-a14b": (57.4e9, 14.2e9), "qwen3-0.6b": (0.596e9, 0.596e9),
    "qwen3-235b-a22b": (235.1e9, 22.2e9), "qwen3-30b-a3b": (30.5e9, 3.35e9), "qwen3-8b": (8.19e9, 8.19e9),
}  # fmt: skip
"""Total and active parameters of model cards and reports. Of gpt-oss the embedding, which its card leaves out of the
active ones, is added; of GLM-4.5 the prediction layer is left out; of Scout the vision encoder is not counted."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    facts = model_facts(name)
    total, active = PUBLISHED[name]
    assert facts["parameters"] == pytest.approx(total, rel=0.01)
    assert facts["active_parameters"] == pytest.approx(active, rel=0.06)


def test_every_preset_of_a_published_model_is_in_the_table() -> None:
    assert set(preset_names()) - set(PUBLISHED) == {"bench-4b", "tiny-deepseek-v3"}


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("mixtral-8x7b", 32 * 8 * 2 * 128 * 2),
        ("gpt-oss-120b", 36 * 8 * 2 * 64 * 2),
        ("qwen3-235b-a22b", 94 * 4 * 2 * 128 * 2),
    ],
)
def test_cache(name: str, bytes_per_token: int) -> None:
    assert model_facts(name)["kv_bytes_per_token"] == bytes_per_token
