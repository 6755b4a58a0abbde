"""Continuous batching: requests that arrive at any time share decode steps (Orca, OSDI 2022; vLLM, arXiv 2309.06180).

Nothing here knows of a device: an engine takes a chunk of one prompt, or one token of every live sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from time import perf_counter

from moec.runtime.cache import Sequence
from moec.runtime.draws import Draws
from moec.runtime.engine import DrawingSteps, Engine, Ids, Logits, Steps, feed
from moec.runtime.sampling import Sampling


@dataclass
class Rates:
    """Tokens and seconds of both phases; steps count the model's calls, whatever the number of sequences."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_seconds: float = 0.0
    """Part of `decode_seconds`."""

    @property
    def prefill(self) -> float | None:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode(self) -> float | None:
        """New tokens a second after each prompt's first one; None when no step was taken."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were kept; None when none was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


@dataclass(eq=False)
class Request:
    """A prompt and what comes of it: `tokens` grows with every step, a stop token is its last."""

    number: int
    prompt: Ids
    new_tokens: int
    sampling: Sampling
    stop: Collection[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    filled: int = 0
    """Tokens of the prompt that are in the cache."""
    sequence: Sequence | None = field(default=None, repr=False)
    rng: Draws | None = field(default=None, repr=False)
    place: int = 0
    """Which of its seed's sequences of random numbers it draws by."""

    @property
    def length(self) -> int:
        """Tokens that the sequence may come to hold."""
        return len(self.prompt) + self.new_tokens


Tell = Callable[[Request, int], bool | None]
"""Called with every new token of a request; True ends the request."""


class Scheduler:
    """Serves requests in the order of their arrival.

    One step feeds a chunk of the oldest prompt that is not in the cache yet (several, over the stages of a pipeline),
    then takes one token of every sequence that is: a long prompt does not hold up the others. A request is let in when
    a place in the batch is free and enough pages for all its tokens are neither in use nor promised, so that no
    sequence ever has to be thrown out.
    `stream(request, token)` is called for every new token; where it returns True the request ends with that token.
    """

    def __init__(self, engine: Steps, stream: Tell | None = None) -> None:
        self.engine, self.stream = engine, stream
        self.drawing = engine if isinstance(engine, DrawingSteps) and engine.draws else None
        self.rates = Rates()
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.live)

    def submit(
        self, prompt: Ids, new_tokens: int, sampling: Sampling, stop: Collection[int] = (), place: int | None = None
    ) -> Request:
        """Queue a prompt that was checked against context and vocabulary; `place` of a `Request`: its number."""
        request = Request(self._count, prompt, new_tokens, sampling, stop)
        request.place = request.number if place is None else place
        self._count += 1
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """A chunk of one prompt and a token of every other sequence; the requests that ended."""
        self._admit()
        before = list(self.live)
        unfilled = [r for r in self.live if r.filled < len(r.prompt)]
        if unfilled:
            self._prefill(unfilled[0])
        self._decode([r for r in self.live if r.tokens and r not in unfilled[:1] and not r.done])
        self.live = [r for r in self.live if not r.done]
        return [r for r in before if r.done]

    def close(self) -> None:
        """Give back the pages of every unfinished request."""
        for request in self.live:
            self._end(request)
        self.live.clear()
        self.waiting.clear()

    def _admit(self) -> None:
        while self.waiting and len(self.live) < self.engine.batch and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            request.sequence = self.engine.pool.open()
            request.rng = request.sampling.generator(request.place)
            self.live.append(request)

    def _fits(self, request: Request) -> bool:
        pool = self.engine.pool
        promised = sum(self._pages(r) - (r.sequence.held if r.sequence else 0) for r in self.live)
        # An empty engine takes the request: whether it fits at all was checked against the context.
        return not self.live or self._pages(request) <= pool.free - promised

    def _pages(self, request: Request) -> int:
        return -(-request.length // self.engine.pool.page_size)

    def _prefill(self, request: Request) -> None:
        assert request.sequence is not None
        began = perf_counter()
        chunk, most = self.engine.chunk, self.engine.pieces if isinstance(self.engine, Engine) else 1
        tokens = request.prompt[request.filled : request.filled + chunk * most]
        last = request.filled + len(tokens) == len(request.prompt)
        if self.drawing is not None:
            assert request.rng is not None
            asked = request.sampling.asked(request.rng) if last else None
            token = self.drawing.prefill_draw(request.sequence, tokens, asked)
        else:
            pieces = [tokens[begin : begin + chunk] for begin in range(0, len(tokens), chunk)]
            *_, logits = feed(self.engine, request.sequence, pieces)
        request.filled += len(tokens)
        self.rates.prompt_tokens += len(tokens)
        self.rates.prefill_seconds += perf_counter() - began
        if last and self.drawing is not None:
            self._take(request, token)
        elif last:
            self._accept(request, logits[0])

    def _decode(self, requests: list[Request]) -> None:
        if not requests:
            return
        began = perf_counter()
        sequences = [r.sequence for r in requests if r.sequence is not None]
        fed = [r.tokens[-1] for r in requests]
        if self.drawing is not None:
            asked = [r.sampling.asked(r.rng) for r in requests if r.rng is not None]
            for request, token in zip(requests, self.drawing.decode_draw(sequences, fed, asked), strict=True):
                self._take(request, token)
        else:
            logits = self.engine.decode(sequences, fed)
            for row, request in enumerate(requests):
                self._accept(request, logits[row])
        self.rates.decode_steps += 1
        self.rates.decoded_tokens += len(requests)
        self.rates.decode_seconds += perf_counter() - began

    def _accept(self, request: Request, logits: Logits) -> None:
        assert request.rng is not None
        self._take(request, request.sampling.draw(logits, request.rng))

    def _take(self, request: Request, token: int) -> None:
        """Add a token to a request, and end it when it is the last."""
        request.tokens.append(token)
        ended = self.stream is not None and self.stream(request, token) is True
        if ended or len(request.tokens) >= request.new_tokens or token in request.stop:
            self._end(request)

    def _end(self, request: Request) -> None:
        request.done = True
        if request.sequence is not None:
            self.engine.pool.close(request.sequence)
            request.sequence = None
