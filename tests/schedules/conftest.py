"""Schedules for the tests, made once: four MoE layers over eight devices in two micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import moec

OVERRIDES = {"num_hidden_layers": "6"}


@functools.cache
def _text(phase: str, count: str) -> str:
    from moec.passes.planning import LayoutRequest

    plan = moec.trace("tiny-deepseek-v3", OVERRIDES).optimize(
        "h800",
        phase=phase,
        batch=64,
        context=256,
        chunk=256,
        layout=LayoutRequest(ranks=8),
        recipe="bf16",
        passes=[f"split-microbatches{{count={count}}}"],
    )
    return str(plan.ir)


@pytest.fixture(scope="session")
def schedule_text() -> Callable[..., str]:
    """`schedule_text(phase="decode", count="2")`: the IR of a scheduled phase."""

    def text(phase: str = "decode", count: str = "2") -> str:
        return _text(phase, count)

    return text
