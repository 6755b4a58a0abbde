"""Telling a wrong weight from a wrong kernel: the artifact's stored bytes against those that the checkpoint gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from moec.codegen.pack import points
from moec.codegen.storage import stored_arrays
from moec.ir import Module, Op, WeightRef
from moec.ir.evaluate import WeightPrograms
from moec.ir.numeric import Packed
from moec.runtime.plan import Argument
from moec.runtime.weights import Weights


class StoredWeights:
    """The weights of an artifact whose program is `module`, beside weight programs on another checkpoint."""

    def __init__(self, module: Module, stored: Weights) -> None:
        self._module = module
        self._stored = stored

    def differing(self, programs: WeightPrograms, op: Op, layer: int | None) -> tuple[str, ...]:
        """The weights of an op in a layer, `@name[l, e]`, that are stored otherwise than `programs` make them."""
        found = []
        for operand in op.operands:
            if not isinstance(operand, WeightRef):
                continue
            weight = self._module.weights[operand.name]
            arrays = [self._bytes(a.name, a.nbytes) for a in stored_arrays(weight)]
            for number, point in enumerate(points(weight)):
                if operand.indices and point[0] != layer:
                    continue
                sizes = [len(a) // weight.points() for a in arrays]
                kept = [a[number * s : (number + 1) * s] for a, s in zip(arrays, sizes, strict=True)]
                made = _stored_form(programs.value(operand.name, point))
                if any(not np.array_equal(a, b) for a, b in zip(kept, made, strict=True)):
                    found.append(f"@{operand.name}[{', '.join(map(str, point))}]" if point else f"@{operand.name}")
        return tuple(found)

    def _bytes(self, name: str, size: int) -> NDArray[np.uint8]:
        return self._stored.view(Argument(name, "weight", np.dtype(np.uint8), (size,))).astype(np.uint8, copy=False)


def _stored_form(value: torch.Tensor | Packed) -> Iterator[NDArray[np.uint8]]:
    """Bytes of data, and of scales when there are any."""
    parts = [value.data(), value.scales()] if isinstance(value, Packed) else [value]
    for part in parts:
        if part is not None:
            yield part.contiguous().view(torch.uint8).reshape(-1).numpy()
