"""Tensors that a graph puts together from parts, and permutations that undo one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class Unsupported(Exception):
    """A node that has no meaning here; the message says why."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that is being put together from parts along one dim: {(start, stop): part}."""

    axis: int
    size: int
    parts: tuple[tuple[int, int, torch.Tensor], ...]

    def permuted(self, perm: list[int]) -> Pieces:
        """All parts with their dims in another order."""
        return Pieces(perm.index(self.axis), self.size, tuple((a, b, permute(p, perm)) for a, b, p in self.parts))

    def whole(self) -> torch.Tensor:
        """The tensor. Raises Unsupported where a part is missing."""
        at = 0
        for start, stop, _ in self.parts:
            if start != at:
                raise Unsupported("a tensor is written in part only")
            at = stop
        if at != self.size:
            raise Unsupported("a tensor is written in part only")
        rank = self.parts[0][2].ndim
        if self.axis == rank - 2:
            # Keys that are joined lying down: joined first and then laid down, as attention reads.
            swap = [*range(rank - 2), rank - 1, rank - 2]
            return torch.cat([permute(p, swap) for _, _, p in self.parts], -1).transpose(-1, -2)
        return torch.cat([p for _, _, p in self.parts], self.axis)


def permute(x: torch.Tensor, perm: list[int]) -> torch.Tensor:
    """Dims in another order; of two that change places, a transpose. What it undoes goes away."""
    source, before = getattr(x, "permuted_from", (x, list(range(x.ndim))))
    perm = [before[p] for p in perm]
    moved = [i for i, p in enumerate(perm) if i != p]
    if not moved:
        return source
    out = source.transpose(*moved) if len(moved) == 2 else source.permute(perm)
    made: Any = out
    made.permuted_from = (source, perm)
    return out
