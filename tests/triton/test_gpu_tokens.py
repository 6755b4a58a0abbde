"""Artifacts for a GPU beyond logits: maps of layers, streams, drafts and drawn tokens, as in test_gpu_engine.py.

A file of its own so that two workers share the interpreter's slowest tests.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_gpu_engine import ALL_CHOSEN, SMALL


def test_tensor_maps_of_every_layer_and_bucket(interpreter: Any) -> None:
    """Decode in FP8: operands of products are named by descriptors, those of weights anew for every layer."""
    found = interpreter(
        "prompts_error", target="h800", recipe="deepseek-v3", settings=ALL_CHOSEN, tokens=2, phase="decode"
    )
    assert found["whole"] < 0.5 and found["steps"] < 0.5, found
    assert found["maps"] > 0 and not found["idle"]


def test_streams_and_events_of_a_schedule(interpreter: Any) -> None:
    """The shared expert on a second stream: its launches wait for the first, and the sum waits for them."""
    found = interpreter(
        "prompts_error", target="h800", recipe="fp32", settings=SMALL, tokens=2, phase="decode", streams=True
    )
    assert found["whole"] < 1e-5 and found["steps"] < 1e-5, found
    # The main stream starts the second and takes turns with it around the dense layer, which has no stream; one MoE
    # layer records and waits twice; the second stream ends before what has none behind the layer, and at the end.
    assert found["events"][:14] == ["record", "wait"] * 7, found["events"]


@pytest.mark.parametrize(("drafts", "new"), [(2, 7), pytest.param(1, 5, marks=pytest.mark.slow)])
def test_drafts_change_no_token(interpreter: Any, drafts: int, new: int) -> None:
    """Drafted and verified on the device: the tokens of plain greedy decoding, fewer steps, the module's own logits."""
    found = interpreter("drafts_found", recipe="fp32", drafts=drafts, new=new)
    assert found["drafted"] == found["plain"]
    assert 0 < found["accepted"] <= found["tried"]
    assert found["worst"] < 1e-5, found
    assert not found["idle"]


def test_tokens_are_drawn_on_the_device(interpreter: Any) -> None:
    """The host's tokens for the same seed, whatever runs beside, and no logits ever come down."""
    found = interpreter("draws_found", settings=SMALL, new=4)
    assert found["device"] == found["host"] and found["greedy"] == found["host_greedy"]
    assert found["alone"] == found["device"][0] != found["other"]
    assert found["downloaded"] <= 4 * 2, "more than a token of each row"
