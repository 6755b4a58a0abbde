"""Continuous batching: requests that arrive over time give what each gives alone, within the pages that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_artifact

import moec
from moec.runtime.cache import PagePool, Sequence
from moec.runtime.errors import PromptTooLong, TokenOutsideVocabulary
from moec.runtime.sampling import Sampling
from moec.runtime.scheduler import Scheduler


def prompts(count: int, most: int, seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, toy_artifact.VOCAB - 1, rng.integers(1, most)).tolist() for _ in range(count)]


def test_requests_that_arrive_over_time_give_what_they_give_alone(toy: Path) -> None:
    model = moec.load(toy)
    given = prompts(7, 120)
    alone = [model.generate(p, 9) for p in given]
    server = model.serve()
    requests = []
    for i, p in enumerate(given):
        requests.append(server.submit(p, 9))
        for _ in range(i % 3):
            server.step()
    server.run()
    assert [r.tokens for r in requests] == alone
    assert all(r.done for r in requests) and not server.busy
    assert model.engine.pool.free == model.engine.pool.pages
    assert server.rates.prompt_tokens == sum(map(len, given))


def test_a_long_prompt_does_not_hold_up_the_others(toy: Path) -> None:
    """While its chunks are fed, a sequence that is live gets a token every step."""
    model = moec.load(toy)
    server = model.serve()
    short = server.submit([1, 2], 50, stop=[])
    server.step()
    server.submit([5] * 150, 4, stop=[])
    for count in range(2, 5):
        server.step()
        assert len(short.tokens) == count
    server.close()
    assert model.engine.pool.free == model.engine.pool.pages


def test_sampled_tokens_depend_on_seed_and_place_in_the_queue_alone(toy: Path) -> None:
    model = moec.load(toy)
    given = prompts(4, 30)
    runs = []
    for pause in (0, 2):
        server = model.serve()
        requests = []
        for p in given:
            requests.append(server.submit(p, 8, temperature=0.8, top_p=0.9, seed=5))
            for _ in range(pause):
                server.step()
        server.run()
        runs.append([r.tokens for r in requests])
    assert runs[0] == runs[1]


def test_wrong_requests_are_refused_when_they_are_made(toy: Path) -> None:
    server = moec.load(toy).serve()
    with pytest.raises(TokenOutsideVocabulary):
        server.submit([toy_artifact.VOCAB], 1)
    with pytest.raises(PromptTooLong):
        server.submit([1] * (toy_artifact.CONTEXT + 1), 1)
    assert not server.busy


class Counting:
    """An engine that computes nothing, with few pages, and notes how many sequences it held."""

    def __init__(self, pages: int, batch: int) -> None:
        self.pool = PagePool(pages, 4, 64)
        self.batch, self.chunk, self.rows = batch, 8, 8
        self.weights: Any = None
        self.threads = 1
        self.most = 0

    def use_threads(self) -> None:
        pass

    def prefill(self, sequence: Sequence, tokens: Any, last_only: bool = True) -> Any:
        self.pool.extend(sequence, len(tokens))
        sequence.length += len(tokens)
        return np.zeros((1, 5), dtype=np.float32)

    def decode(self, sequences: Any, tokens: Any) -> Any:
        for sequence in sequences:
            self.pool.extend(sequence, 1)
            sequence.length += 1
        self.most = max(self.most, len(sequences))
        return np.zeros((len(sequences), 5), dtype=np.float32)


@pytest.mark.parametrize("pages", [9, 12, 40])
def test_pages_are_promised_before_a_request_is_let_in(pages: int) -> None:
    """No step runs out of pages, however few there are, and all requests end in the order of their arrival."""
    engine = Counting(pages, 6)
    scheduler = Scheduler(engine)
    requests = [scheduler.submit(np.zeros(5 + i, dtype=np.int64), 20, Sampling()) for i in range(10)]
    ended: list[int] = []
    while scheduler.busy:
        ended += [r.number for r in scheduler.step()]
    assert ended == list(range(10))
    assert all(len(r.tokens) == 20 for r in requests)
    assert engine.pool.free == pages
    assert 1 <= engine.most <= min(6, pages // 7)
