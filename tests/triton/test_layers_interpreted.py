"""Kernels in sequence, each reading what the one before wrote, against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(("tokens", "masked"), [(1, True), (9, True), (1, False), (9, False)])
def test_routed_experts(interpreter: Any, tokens: int, masked: bool) -> None:
    """BF16 rounds the experts' results once and the sum once; an FP8 tie that falls the other way moves little."""
    assert interpreter("experts_error", tokens=tokens, masked=masked) < 4e-3


@pytest.mark.parametrize("splits", [1, 4])
def test_absorbed_attention(interpreter: Any, splits: int) -> None:
    assert interpreter("attention_error", splits=splits) < 3e-3
