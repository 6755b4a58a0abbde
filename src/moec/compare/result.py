"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OpError:
    """How far the results of one op are from the reference, in units of the reference's standard deviation.

    Integer results differ by whole numbers. `rerouted` tokens went to other experts than the reference chooses.
    """

    function: str
    layer: int | None
    op: str
    location: tuple[str, ...]
    """File and line of the model, then the passes that made the op, oldest first."""
    error: float
    rerouted: int = 0
    weights: tuple[str, ...] = ()
    """Of an op that departs: its weights that are stored otherwise than the checkpoint gives them."""

    def as_json(self) -> dict[str, Any]:
        """Plain data; an infinite error is null."""
        return {
            "function": self.function,
            "layer": self.layer,
            "op": self.op,
            "location": list(self.location),
            "error": finite(self.error),
            "rerouted": self.rerouted,
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Comparison:
    """The errors of all traced ops in the order of execution, and of the logits.

    `near_ties`: tokens of a layer whose experts differ from the reference's by no more than rounding. `logits_error`:
    the traced kernels against the reference run from end to end. `artifact_error`: the artifact's own kernels against
    the traced. `transformers_error`: the artifact's own kernels against transformers in FP32.
    """

    bound: float
    tokens: int
    ops: tuple[OpError, ...]
    near_ties: int
    logits_error: float
    artifact_error: float
    transformers_error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> OpError:
        """The op with the greatest error."""
        return max(self.ops, key=lambda op: op.error)

    @property
    def departures(self) -> list[OpError]:
        """The ops beyond the bound, first executed first."""
        return [op for op in self.ops if op.error > self.bound]

    @property
    def agrees(self) -> bool:
        """Whether every op and the artifact's own kernels are within the bound."""
        return not self.departures and self.artifact_error <= self.bound

    def as_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        oracle = self.transformers_error
        return {
            "agrees": self.agrees,
            "tokens": self.tokens,
            "ops": len(self.ops),
            "bound": self.bound,
            "near_ties": self.near_ties,
            "worst": self.worst.as_json(),
            "departures": [op.as_json() for op in self.departures],
            "logits_error": finite(self.logits_error),
            "artifact_error": finite(self.artifact_error),
            "transformers_error": None if oracle is None else finite(oracle),
        }


def finite(error: float) -> float | None:
    """`error`, or None where JSON has no number for it."""
    return error if isfinite(error) else None


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference over the standard deviation of `expected`; infinite where `got` is not finite.

    Integers are not scaled: any difference is at least 1.
    """
    wanted = expected.double()
    difference = (got.double() - wanted).abs()
    if not bool(difference.isfinite().all()):
        return inf
    greatest = float(difference.max())
    if not expected.is_floating_point():
        return greatest
    spread = float(wanted.std(correction=0)) or float(wanted.abs().max()) or 1.0
    return greatest / spread
