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
        return pick(nucleus(logits, self.temperature, self.top_p), rng)

    def propose(self, logits: NDArray[np.float32], rng: np.random.Generator) -> Proposal:
        """A drafted token from the draft's `logits` f32[V]."""
        if self.temperature == 0:
            return Proposal(int(logits.argmax()), None)
        probabilities = nucleus(logits, self.temperature, self.top_p)
        return Proposal(pick(probabilities, rng), probabilities)

    def verify(self, proposal: Proposal, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
        """The token that the model's `logits` f32[V] give: the proposed one where it is kept, else another.

        Tokens are distributed as by `draw` whatever the proposals (speculative sampling: Leviathan et al., arXiv
        2211.17192, appendix A.1): a proposal x is kept with probability min(1, p(x) / q(x)); otherwise the token is
        drawn from max(0, p - q). At temperature 0 it is what `draw` returns.
        """
        if proposal.probabilities is None:
            return int(logits.argmax())
        p, q = nucleus(logits, self.temperature, self.top_p), proposal.probabilities
        if rng.random() * q[proposal.token] < p[proposal.token]:
            return proposal.token
        rest = np.maximum(p - q, 0)
        # Where p and q differ by rounding alone nothing is left.
        return pick(rest if rest.any() else p, rng)


@dataclass(frozen=True)
class Proposal:
    """A drafted token and the probabilities f64[V] that it was drawn with; None: it was the most probable one."""

    token: int
    probabilities: NDArray[np.float64] | None


def pick(weights: NDArray[np.float64], rng: np.random.Generator) -> int:
    """An index drawn in proportion to `weights` f64[V]."""
    reach = np.cumsum(weights)
    # The last sum may round to below 1, and what has no weight must stay out of reach.
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
