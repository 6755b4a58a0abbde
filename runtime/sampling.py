"""The next token from logits: the greatest, or a draw at a temperature from a part of the most probable tokens.

The part is the `top_k` most probable ones, of these the smallest set that reaches `top_p` of their sum (nucleus;
Holtzman et al., arXiv 1904.09751), of these what has at least `min_p` of the greatest probability (Nguyen et al., arXiv
2407.01082): the order in which transformers applies them. Of equals the first are taken. A device draws by the same
rule (`codegen/triton/kernels/sampling.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moec.runtime.draws import Draws
from moec.runtime.errors import WrongOption

COLDEST: Final = 1e-30
"""Least temperature above 0: logits divided by less exceed FP32, in which devices draw."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most probable token, the first of equals.

    `top_k` 0 and `min_p` 0 leave none out. Raises WrongOption unless temperature is 0 or at least `COLDEST`,
    0 < top_p <= 1, seed >= 0, top_k >= 0 and 0 <= min_p <= 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise WrongOption(option="temperature", expected="a finite number >= 0", value=self.temperature)
        if 0 < self.temperature < COLDEST:
            expected = f"0 (the most probable token) or at least {COLDEST:g}"
            raise WrongOption(option="temperature", expected=expected, value=self.temperature)
        if not 0 < self.top_p <= 1:
            raise WrongOption(option="top-p", expected="above 0 and at most 1", value=self.top_p)
        if self.seed < 0:
            raise WrongOption(option="seed", expected="at least 0", value=self.seed)
        if self.top_k < 0:
            raise WrongOption(option="top-k", expected="at least 0 (0: all tokens)", value=self.top_k)
        if not 0 <= self.min_p <= 1:
            raise WrongOption(option="min-p", expected="from 0 to 1", value=self.min_p)

    def generator(self, sequence: int) -> Draws:
        """The random numbers of one sequence: what it draws does not depend on the sequences beside it."""
        return Draws.of(self.seed, sequence)

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """What is drawn from at a temperature above 0, f64[V]."""
        return nucleus(logits, self.temperature, self.top_p, self.top_k, self.min_p)

    def draw(self, logits: NDArray[np.float32], rng: Draws) -> int:
        """A token id from `logits` f32[V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        return pick(self.probabilities(logits), rng)

    def asked(self, rng: Draws) -> Draw:
        """The same draw, for a device to make."""
        number = rng.count
        rng.count += self.temperature > 0
        return Draw(self, rng.key, number)

    def propose(self, logits: NDArray[np.float32], rng: Draws) -> Proposal:
        """A drafted token from the draft's `logits` f32[V]."""
        if self.temperature == 0:
            return Proposal(int(logits.argmax()), None)
        probabilities = self.probabilities(logits)
        return Proposal(pick(probabilities, rng), probabilities)

    def verify(self, proposal: Proposal, logits: NDArray[np.float32], rng: Draws) -> int:
        """The token that the model's `logits` f32[V] give: the proposed one where it is kept, else another.

        Tokens are distributed as by `draw` whatever the proposals (speculative sampling: Leviathan et al., arXiv
        2211.17192, appendix A.1): a proposal x is kept with probability min(1, p(x) / q(x)); otherwise the token is
        drawn from max(0, p - q). At temperature 0 it is what `draw` returns.
        """
        if proposal.probabilities is None:
            return int(logits.argmax())
        p, q = self.probabilities(logits), proposal.probabilities
        if rng.random() * q[proposal.token] < p[proposal.token]:
            return proposal.token
        rest = np.maximum(p - q, 0)
        # Where p and q differ by rounding alone nothing is left.
        return pick(rest if rest.any() else p, rng)


@dataclass(frozen=True)
class Draw:
    """A draw for a device: options, and the number `number` of those that belong to `key`."""

    sampling: Sampling
    key: int
    number: int


@dataclass(frozen=True)
class Proposal:
    """A drafted token and the probabilities f64[V] that it was drawn with; None: it was the most probable one."""

    token: int
    probabilities: NDArray[np.float64] | None


def pick(weights: NDArray[np.float64], rng: Draws) -> int:
    """An index drawn in proportion to `weights` f64[V]."""
    reach = np.cumsum(weights)
    # The last sum may round to below 1, and what has no weight must stay out of reach.
    return int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))


def nucleus(
    logits: NDArray[np.float32], temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> NDArray[np.float64]:
    """Probabilities f64[V] of softmax(logits / temperature) within the part of the tokens that is drawn from."""
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves the greatest alone
        probabilities: NDArray[np.float64] = np.exp(below / temperature)
    probabilities /= probabilities.sum()
    if 0 < top_k < len(probabilities):
        kept = np.argpartition(-probabilities, top_k - 1)[:top_k]
        least = probabilities[kept].min()
        above, equal = np.flatnonzero(probabilities > least), np.flatnonzero(probabilities == least)
        probabilities = _only(probabilities, np.concatenate((above, equal[: top_k - len(above)])))
    if top_p < 1:
        order = _most_probable(probabilities, top_p)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities = _only(probabilities, order[before < top_p])
    if min_p > 0:
        probabilities = _only(probabilities, np.flatnonzero(probabilities >= min_p * probabilities.max()))
    return probabilities


def _only(probabilities: NDArray[np.float64], kept: NDArray[np.intp]) -> NDArray[np.float64]:
    """The kept tokens' probabilities, which sum to 1 again."""
    out = np.zeros_like(probabilities)
    out[kept] = probabilities[kept] / probabilities[kept].sum()
    return out


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
