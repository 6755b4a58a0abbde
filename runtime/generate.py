"""Continuous batching over the engine: a waiting prompt takes the place of each sequence that ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from moec.runtime.cache import Sequence
from moec.runtime.engine import Ids, Logits, Steps
from moec.runtime.sampling import Sampling

Stream = Callable[[int, int], None]
"""Called with (index of the prompt, new token) for every new token."""


@dataclass
class Rates:
    """Tokens and seconds of both phases."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill(self) -> float | None:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode(self) -> float | None:
        """New tokens a second after each prompt's first one; None when no step was taken."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else None


@dataclass
class Completions:
    """New tokens for each prompt, a stop token included, and the rates."""

    tokens: list[list[int]]
    rates: Rates = field(default_factory=Rates)


@dataclass
class _Live:
    """A prompt whose sequence is in the cache."""

    index: int
    sequence: Sequence
    rng: np.random.Generator


def complete(
    engine: Steps,
    prompts: List[Ids],
    new_tokens: int,
    sampling: Sampling,
    stop: Collection[int],
    stream: Stream | None = None,
) -> Completions:
    """Continue each prompt by up to `new_tokens` tokens, or to a token in `stop`.

    Any number of prompts: at most `engine.batch` are live at a time. The caller has checked the prompts against the
    context and the vocabulary.
    """
    done = Completions([[] for _ in prompts])
    waiting = deque(enumerate(prompts))
    live: list[_Live] = []

    def accept(one: _Live, logits: Logits) -> bool:
        """Draw the next token of `one`; False when it ended and its pages are free again."""
        token = sampling.draw(logits, one.rng)
        tokens = done.tokens[one.index]
        tokens.append(token)
        if stream:
            stream(one.index, token)
        return len(tokens) < new_tokens and token not in stop

    try:
        while waiting or live:
            while waiting and len(live) < engine.batch:
                index, prompt = waiting.popleft()
                one = _Live(index, engine.pool.open(), sampling.generator(index))
                live.append(one)
                if not accept(one, prefill(engine, one.sequence, prompt, done.rates)):
                    engine.pool.close(live.pop().sequence)
            if live:
                _step(engine, live, done, accept)
    finally:
        for one in live:
            engine.pool.close(one.sequence)
    return done


def prefill(engine: Steps, sequence: Sequence, prompt: Ids, rates: Rates) -> Logits:
    """Feed a prompt in chunks; returns the logits f32[V] after its last token and adds to `rates`."""
    began = perf_counter()
    for start in range(0, len(prompt), engine.chunk):
        logits = engine.prefill(sequence, prompt[start : start + engine.chunk])
    rates.prompt_tokens += len(prompt)
    rates.prefill_seconds += perf_counter() - began
    return logits[0]  # type: ignore[no-any-return]


def _step(engine: Steps, live: list[_Live], done: Completions, accept: Callable[[_Live, Logits], bool]) -> None:
    """One token for every live sequence; those that end leave `live`."""
    began = perf_counter()
    logits = engine.decode([one.sequence for one in live], [done.tokens[one.index][-1] for one in live])
    going = [accept(one, logits[row]) for row, one in enumerate(live)]
    done.rates.decoded_tokens += len(live)
    done.rates.decode_seconds += perf_counter() - began
    for one, on in zip(live, going, strict=True):
        if not on:
            engine.pool.close(one.sequence)
    live[:] = [one for one, on in zip(live, going, strict=True) if on]
