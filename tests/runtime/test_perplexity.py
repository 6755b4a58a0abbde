"""Perplexity, against windows scored one by one by the toy model's definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_artifact import CONTEXT, expected_logits

from moec.runtime import Model, load
from moec.runtime.errors import TextTooShort, WrongOption
from moec.runtime.perplexity import score_text

TEXT = "".join(chr(ord("a") + n * n % 23) for n in range(330)) + "é世"


@pytest.fixture(scope="module")
def model(toy: Path) -> Model:
    return load(toy)


def expected_loss(ids: list[int], stride: int) -> float:
    """Each token by the earliest window that holds it behind another token, one at a time."""
    total = 0.0
    for position in range(1, len(ids)):
        begin = 0
        while position >= begin + CONTEXT:
            begin += stride
        logits = torch.from_numpy(expected_logits(np.array(ids[begin:position]))[-1])
        total -= float(logits.log_softmax(0)[ids[position]])
    return total / (len(ids) - 1)


@pytest.mark.parametrize("stride", [None, 1 + CONTEXT // 3, CONTEXT - 1])
def test_perplexity_is_that_of_sliding_windows(model: Model, stride: int | None) -> None:
    ids = model.tokenizer.encode(TEXT)
    score = score_text(model, TEXT, stride)
    expected = expected_loss(ids, stride or CONTEXT // 2)
    assert score.tokens == len(ids) - 1
    assert score.loss == pytest.approx(expected, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_bits_a_byte_leave_out_the_token_that_is_not_scored(model: Model) -> None:
    score = score_text(model, TEXT)
    assert score.bytes == len(TEXT.encode()) - 1
    assert score.bits_per_byte == pytest.approx(score.loss * score.tokens / math.log(2) / score.bytes)


def test_progress_ends_at_the_last_token(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    score = score_text(model, TEXT, 50, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (score.tokens, score.tokens)
    assert seen == sorted(seen)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_token_to_score(model: Model, text: str) -> None:
    with pytest.raises(TextTooShort, match="at least two"):
        score_text(model, text)


@pytest.mark.parametrize("stride", [0, CONTEXT])
def test_strides_out_of_range(model: Model, stride: int) -> None:
    with pytest.raises(WrongOption, match="stride"):
        score_text(model, "some text", stride)
