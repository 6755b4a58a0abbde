"""Recorded loads, one or several: what `moec run --record-loads` wrote, or any array of tokens per expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import printable
from moec.passes.placement import errors, formats
from moec.passes.placement.problem import Floats, numeric_array


@dataclass(frozen=True)
class Recording:
    """Tokens by layer and expert, float64[layers, experts], and by pair of experts where that was recorded.

    `layers` are the model's numbers of the layers; None when the file does not say.
    """

    name: str
    loads: Floats
    coactivation: Floats | None = None
    layers: tuple[int, ...] | None = None

    def save(self, path: Path) -> None:
        """Write an npz with the fields of a recording, whole or not at all; raises NotWritten."""
        fields: dict[str, Any] = {"loads": self.loads}
        if self.coactivation is not None:
            fields["coactivation"] = self.coactivation
        if self.layers is not None:
            fields["layers"] = np.array(self.layers, dtype=np.int64)
        formats.write_npz(path, fields)


def read_recording(path: Path) -> Recording:
    """Read loads, with co-activation and layers where the file has them; raises as `formats.read_loads`."""
    loads = formats.read_loads(path)
    shape = (len(loads), loads.shape[1], loads.shape[1])
    pairs = formats.read_optional(path, "coactivation")
    if pairs is not None:
        pairs = numeric_array(path.name, pairs, 3, "[layers, experts, experts]")
        if pairs.shape != shape:
            raise errors.WrongRank(name=path.name, expected=list(shape), shape=list(pairs.shape))
    layers = formats.read_optional(path, "layers")
    if layers is not None:
        layers = numeric_array(path.name, layers, 1, "[layers]")
        if len(layers) != len(loads):
            raise errors.WrongRank(name=path.name, expected=[len(loads)], shape=list(layers.shape))
        if (layers != layers.round()).any():
            at = int((layers != layers.round()).argmax())
            raise errors.NotWhole(name=path.name, value=layers[at], at=at)
    numbers = None if layers is None else tuple(int(n) for n in layers)
    return Recording(path.name, loads, pairs, numbers)


def merge(
    recordings: Sequence[Recording], weights: str = "tokens", *, name: str = "--weights", between: str = ","
) -> tuple[Recording, list[float]]:
    """One recording of several of the same model, and the factor that each was multiplied by.

    `weights`: "tokens" adds them as they are, so that each counts by its tokens; "equal" lets each count the same;
    numbers with `between` between them are factors. Co-activation is kept when all have it. Raises RecordingsDiffer, or
    NotPositive, in which `name` is what the user calls the weights.
    """
    first = recordings[0]
    for other in recordings[1:]:
        if other.loads.shape != first.loads.shape:
            what = f"loads of {list(first.loads.shape)} and {list(other.loads.shape)} (layers, experts)"
            raise errors.RecordingsDiffer(first=first.name, other=other.name, what=what)
        if first.layers is not None and other.layers is not None and first.layers != other.layers:
            raise errors.RecordingsDiffer(first=first.name, other=other.name, what="different layers of a model")
    factors = _factors(recordings, weights, name, between)
    loads = sum((f * r.loads for f, r in zip(factors, recordings, strict=True)), np.zeros_like(first.loads))
    pairs: Floats | None = None
    if all(r.coactivation is not None for r in recordings):
        pairs = np.zeros((*first.loads.shape, first.loads.shape[1]))
        for factor, recording in zip(factors, recordings, strict=True):
            assert recording.coactivation is not None
            pairs += factor * recording.coactivation
    layers = next((r.layers for r in recordings if r.layers is not None), None)
    return Recording(", ".join(r.name for r in recordings), np.asarray(loads), pairs, layers), factors


def _factors(recordings: Sequence[Recording], weights: str, name: str, between: str) -> list[float]:
    if weights == "tokens":
        return [1.0] * len(recordings)
    totals = [float(r.loads.sum()) for r in recordings]
    if weights == "equal":
        mean = sum(totals) / len(totals)
        return [mean / total if total > 0 else 0.0 for total in totals]
    try:
        factors = [float(part) for part in weights.split(between)]
    except ValueError:
        factors = []
    if len(factors) != len(recordings) or not all(0 <= f < float("inf") for f in factors) or not any(factors):
        apart = f" with {between!r} between them" if len(recordings) > 1 else ""
        wanted = f"tokens, equal, or {len(recordings)} number(s) of at least 0{apart}, not all 0"
        raise errors.NotPositive(name=name, expected=wanted, value=printable(weights))
    return factors
