"""Compiled models against transformers: the same weights must give the same logits, however the prompt is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import VARIANTS, save_model

import moec
import moec.errors

BOUND = 1e-4
"""Greatest difference of logits in units of their standard deviation."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    """Prefill, prefill in chunks, and decode at every step behind the first token."""
    oracle = save_model(variant, tmp_path / "hf", seed=len(variant))
    plan = moec.trace(str(tmp_path / "hf")).optimize("cpu", batch=2, context=96, chunk=32, recipe="fp32")
    model = moec.load(plan.compile(tmp_path / "m.moec").path)
    ids = np.random.default_rng(1).integers(0, 211, (2, 70))
    with torch.no_grad():
        expected = oracle(torch.tensor(ids)).logits.numpy()
    for chunk in (None, 7, 1):
        got = model.logits(ids, chunk=chunk)
        assert np.abs(got - expected).max() / expected.std() < BOUND, f"chunk={chunk}"


def test_logits_come_from_the_artifact(tmp_path: Path) -> None:
    """Without its kernels an artifact computes nothing: the runtime holds no implementation of its own."""
    plan = moec.trace("tiny-deepseek-v3").optimize("cpu", context=64, chunk=16)
    path = plan.compile(tmp_path / "m.moec", random_weights=0).path
    for file in (path / "kernels").iterdir():
        file.unlink()
    with pytest.raises(moec.errors.InputError, match="kernels"):
        moec.load(path)
