"""Which experts the tokens of a run went to: counts by layer and expert, and by pair of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from moec.files import write_whole

Counts = NDArray[np.int64]

_AT_ONCE: Final = 512
"""Tokens that are counted together: products of matrices are cheap then."""


@dataclass(frozen=True)
class Loads:
    """What was recorded; the fields are those of the file.

    `layers` int64[layers]: the layers that have experts. `loads` int64[layers, experts]: tokens that chose an expert.
    `coactivation` int64[layers, experts, experts]: tokens that chose both, on the diagonal those that chose the one.
    """

    layers: Counts
    loads: Counts
    coactivation: Counts

    @staticmethod
    def joined(parts: Iterable[Loads]) -> Loads:
        """The recordings of several ranks as one: those of the same layer are added."""
        by_layer: dict[int, tuple[Counts, Counts]] = {}
        for part in parts:
            for i, layer in enumerate(part.layers.tolist()):
                mine = (part.loads[i], part.coactivation[i])
                known = by_layer.get(layer)
                by_layer[layer] = mine if known is None else (known[0] + mine[0], known[1] + mine[1])
        order = sorted(by_layer)
        return Loads(
            np.array(order, dtype=np.int64),
            np.stack([by_layer[layer][0] for layer in order]),
            np.stack([by_layer[layer][1] for layer in order]),
        )

    def save(self, path: Path) -> None:
        """Write an npz that `moec place` reads, whole or not at all; raises NotWritten."""

        def write(file: IO[bytes]) -> None:
            np.savez_compressed(file, layers=self.layers, loads=self.loads, coactivation=self.coactivation)

        write_whole(path, write)


class LoadRecorder:
    """Adds up the choices of the routers of `layers`; `add` costs a copy, and a product of matrices now and then."""

    def __init__(self, layers: Iterable[int], experts: int) -> None:
        self.layers = np.array(list(layers), dtype=np.int64)
        self.experts = experts
        self._pairs = np.zeros((len(self.layers), experts, experts), dtype=np.int64)
        self._waiting: list[NDArray[np.int32]] = []
        self._tokens = 0

    def add(self, ids: NDArray[Any]) -> None:
        """Count the choices i32[layers, tokens, top_k]; the array may be overwritten afterwards."""
        self._waiting.append(ids.copy())
        self._tokens += ids.shape[1]
        if self._tokens >= _AT_ONCE:
            self._count()

    def loads(self) -> Loads:
        """What was added so far."""
        self._count()
        return Loads(self.layers, np.diagonal(self._pairs, axis1=1, axis2=2).copy(), self._pairs.copy())

    def _count(self) -> None:
        if not self._waiting:
            return
        ids = np.concatenate(self._waiting, axis=1)
        self._waiting, self._tokens = [], 0
        # Sums of ones are exact in FP32 up to 2**24, far beyond the tokens that are counted at once.
        chosen = np.empty((ids.shape[1], self.experts), dtype=np.float32)
        for layer, mine in enumerate(ids):
            chosen[...] = 0
            np.put_along_axis(chosen, mine.astype(np.int64), 1.0, axis=1)
            self._pairs[layer] += (chosen.T @ chosen).astype(np.int64)
