"""Continuing a list of prompts: all of them are requests of one scheduler, which runs until none is left."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from moec.runtime.engine import Ids, Steps
from moec.runtime.sampling import Sampling
from moec.runtime.scheduler import Rates, Request
from moec.runtime.speculate import scheduler_of

Stream = Callable[[int, int], bool | None]
"""Called with (index of the prompt, new token) for every new token; True ends that prompt's continuation."""


@dataclass
class Completions:
    """New tokens for each prompt, a stop token included, and the rates."""

    tokens: list[list[int]]
    rates: Rates = field(default_factory=Rates)


def complete(
    engine: Steps,
    prompts: List[Ids],
    new_tokens: int,
    sampling: Sampling,
    stop: Collection[int],
    stream: Stream | None = None,
    drafts: int = 0,
) -> Completions:
    """Continue each prompt by up to `new_tokens` tokens, or to a token in `stop`.

    `drafts`: tokens of each sequence that a step drafts and verifies; the caller knows that the engine can.

    Any number of prompts: at most `engine.batch` are live at a time. The caller has checked the prompts against the
    context and the vocabulary.
    """

    def tell(request: Request, token: int) -> bool | None:
        return stream(request.number, token) if stream is not None else None

    scheduler = scheduler_of(engine, drafts, tell)
    requests = [scheduler.submit(prompt, new_tokens, sampling, stop) for prompt in prompts]
    try:
        while scheduler.busy:
            scheduler.step()
    finally:
        scheduler.close()
    return Completions([r.tokens for r in requests], scheduler.rates)
