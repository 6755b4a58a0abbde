"""Perplexity of a model on a text: sliding windows, every token scored once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moec.runtime.errors import TextTooShort, WrongOption
from moec.runtime.model import Model


@dataclass(frozen=True)
class Score:
    """Mean `loss` in nats over `tokens` scored tokens, which spell `bytes` bytes of text."""

    tokens: int
    bytes: int
    loss: float
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(loss): for one token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for one byte of the text: comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def score_text(
    model: Model,
    text: str,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score `text` in windows of the compiled context that begin `stride` tokens apart (default: half a window).

    A token's loss comes from the first window that holds it with a token before it, so all but those of the first
    window see at least `window - stride` tokens. The first token of the text is scored only when the tokenizer puts
    a special token before it. Raises NoTokenizer, WrongOption, or TextTooShort. `progress(scored, total)` is called
    after each window, or after as many windows as there are replicas.
    """
    ids, unscored = model.tokenizer.encode_counting(text)
    window = model.context
    step = stride if stride is not None else max(1, window // 2)
    if not 1 <= step < window:
        raise WrongOption(option="stride", expected=f"at least 1 and below the window of {window} tokens", value=step)
    spelled = len(text.encode()) - unscored
    if len(ids) < 2 or spelled < 1:
        raise TextTooShort(tokens=len(ids))
    tokens = np.asarray(ids, dtype=np.int64)
    last = next(begin for begin in range(0, len(ids), step) if begin + window >= len(ids))
    begins = range(0, last + 1, step)
    total, scored = 0.0, 1
    # Windows by as many as replicas compute at the same time.
    for together in (begins[i : i + model.replicas] for i in range(0, len(begins), model.replicas)):
        found = model.losses_of([tokens[begin : begin + window] for begin in together])
        for begin, losses in zip(together, found, strict=True):  # of tokens begin + 1 .. begin + window - 1
            total += float(losses[scored - begin - 1 :].sum())
            scored = min(begin + window, len(ids))
        progress(scored - 1, len(ids) - 1)
    return Score(len(ids) - 1, spelled, total / (len(ids) - 1), window, step)
