"""Sampling, against the warpers of transformers and the expected frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from moec.runtime.errors import WrongOption
from moec.runtime.sampling import Sampling, nucleus


def some_logits(seed: int, size: int = 200) -> NDArray[np.float32]:
    return np.asarray(np.random.default_rng(seed).standard_normal(size) * 3, dtype=np.float32)


@pytest.mark.parametrize("size", [1, 2, 200, 5000])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.0, 1e-6), (0.05, 0.99), (9.0, 0.999)]
)
def test_probabilities_equal_those_of_transformers(size: int, temperature: float, top_p: float) -> None:
    logits = some_logits(size, size)
    scores = torch.from_numpy(logits).double()[None]
    unused = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(unused, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(unused, scores)
    np.testing.assert_allclose(nucleus(logits, temperature, top_p), scores.softmax(-1)[0].numpy(), atol=1e-12)


def test_draws_have_the_frequencies_of_the_probabilities() -> None:
    logits = some_logits(3, size=12)
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=11)
    rng = sampling.generator(0)
    counts = np.bincount([sampling.draw(logits, rng) for _ in range(20_000)], minlength=12)
    expected = nucleus(logits, 1.5, 0.95) * 20_000
    assert not counts[expected == 0].any()
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_greedy_takes_the_first_of_equals() -> None:
    sampling = Sampling()
    assert sampling.draw(np.array([0, 2, 1, 2], dtype=np.float32), sampling.generator(0)) == 1


def test_of_equal_tokens_the_nucleus_takes_the_first() -> None:
    kept = np.flatnonzero(nucleus(np.zeros(1000, dtype=np.float32), 1.0, 0.4))
    assert kept.tolist() == list(range(400))


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[7, 30]] = 0
    sampling = Sampling(temperature=1.0)
    rng = sampling.generator(0)
    assert {sampling.draw(logits, rng) for _ in range(200)} == {7, 30}


def test_seeds_decide() -> None:
    logits = some_logits(1)

    def draws(seed: int, sequence: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        rng = sampling.generator(sequence)
        return [sampling.draw(logits, rng) for _ in range(30)]

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(2, 0)
    assert draws(1, 0) != draws(1, 1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"top_p": float("nan")}, "top-p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], name: str) -> None:
    with pytest.raises(WrongOption, match=f"{name} must be"):
        Sampling(**options)  # type: ignore[arg-type]
