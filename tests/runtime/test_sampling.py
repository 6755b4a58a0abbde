"""Sampling, against the warpers of transformers and the expected frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moec.runtime.draws import Draws, philox
from moec.runtime.errors import WrongOption
from moec.runtime.sampling import COLDEST, Sampling, nucleus


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


@pytest.mark.parametrize("size", [1, 40, 5000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(1, 1.0, 0.0), (7, 1.0, 0.0), (30, 0.6, 0.0), (0, 1.0, 0.1), (200, 0.9, 0.02)]
)
def test_all_limits_equal_those_of_transformers(size: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = some_logits(size + 1, size)
    unused = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(0.8)(unused, torch.from_numpy(logits).double()[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(unused, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(unused, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(unused, scores)
    found = nucleus(logits, 0.8, top_p, top_k, min_p)
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-12)


@pytest.mark.parametrize("temperature", [COLDEST, 1e-20, 1e-3])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_next_to_zero_takes_the_greatest(temperature: float, top_p: float) -> None:
    logits = np.array([1, -40, 3, 2.5], dtype=np.float32)
    assert nucleus(logits, temperature, top_p, min_p=0.1).tolist() == [0, 0, 1, 0]
    assert Sampling(temperature, top_p).draw(logits, Draws.of(0, 0)) == 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-31])
def test_a_temperature_below_what_devices_draw_at_is_refused(temperature: float) -> None:
    with pytest.raises(WrongOption, match="at least 1e-30"):
        Sampling(temperature)


def test_of_equal_tokens_top_k_takes_the_first() -> None:
    logits = np.array([1, 3, 2, 3, 2, 2], dtype=np.float32)
    assert np.flatnonzero(nucleus(logits, 1.0, 1.0, top_k=3)).tolist() == [1, 2, 3]


def test_random_numbers_are_those_of_the_paper() -> None:
    """Known answers of Random123 for Philox 4x32 with ten rounds."""
    assert philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(2**64 - 1, (2**32 - 1,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_random_numbers_are_uniform_and_counted() -> None:
    draws = Draws.of(3, 1)
    found = [draws.random() for _ in range(20_000)]
    counts = np.bincount((np.array(found) * 50).astype(int), minlength=50)
    assert chisquare(counts).pvalue > 1e-3
    assert Draws(draws.key, 11).random() == found[11]


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
        ({"top_k": -1}, "top-k"),
        ({"min_p": 1.5}, "min-p"),
        ({"min_p": float("nan")}, "min-p"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], name: str) -> None:
    with pytest.raises(WrongOption, match=f"{name} must be"):
        Sampling(**options)  # type: ignore[arg-type]
