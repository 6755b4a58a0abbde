"""The next token from logits: greedy, or by temperature and nucleus (top-p; Holtzman et al., arXiv 1904.09751)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import WrongOption


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most probable token, the first of equals.

    Raises WrongOption unless temperature >= 0, 0 < top_p <= 1 and seed >= 0.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise WrongOption(option="temperature", expected="a finite number >= 0", value=self.temperature)
        if not 0 < self.top_p <= 1:
            raise WrongOption(option="top-p", expected="above 0 and at most 1", value=self.top_p)
        if self.seed < 0:
            raise WrongOption(option="seed", expected="at least 0", value=self.seed)

    def generator(self, sequence: int) -> np.random.Generator:
        """The random numbers of one sequence: what it draws does not depend on the sequences beside it."""
        return np.random.default_rng((self.seed, sequence))

    def draw(self, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
        """A token id from `logits` f32[V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = nucleus(logits, self.temperature, self.top_p)
        reach = np.cumsum(probabilities)
        # The last sum may round to below 1, and tokens of probability 0 must stay out of reach.
        return int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))


def nucleus(logits: NDArray[np.float32], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Probabilities f64[V] of softmax(logits / temperature) within the smallest set of tokens that reaches `top_p`."""
    scaled = logits.astype(np.float64) / temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = _most_probable(probabilities, top_p)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[before < top_p]
        rest, probabilities = probabilities, np.zeros_like(probabilities)
        probabilities[kept] = rest[kept] / rest[kept].sum()
    return probabilities


def _most_probable(probabilities: NDArray[np.float64], sum_: float) -> NDArray[np.intp]:
    """Enough tokens to reach `sum_`, the most probable first, equals by their id.

    Sorting a whole vocabulary takes as long as a decode step, and the nucleus is mostly small.
    """
    size = 256
    while size < len(probabilities):
        least = np.partition(probabilities, -size)[-size]
        candidates = np.flatnonzero(probabilities >= least)
        if probabilities[candidates].sum() >= sum_:
            return candidates[np.argsort(-probabilities[candidates], kind="stable")]
        size *= 8
    return np.argsort(-probabilities, kind="stable")
