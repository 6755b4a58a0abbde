"""Parts that families share: parameters on the meta device, a stack of equal layers, feed-forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moec.model_defs import functional as F

Tensor = Any


def weight(*shape: int) -> nn.Parameter:
    """A parameter without data: only its shape counts."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Layers(nn.Module):
    """Equal layers `first..last`, traced once: `body(layer, x, *state)` returns the next x."""

    def __init__(self, body: nn.Module, first: int, last: int) -> None:
        super().__init__()
        self.body = body
        self.first = first
        self.last = last

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        """Never runs: the tracer turns it into one `repeat`."""
        raise TypeError("model definitions are traced, not run; use moec.trace(...)")


class Mlp(nn.Module):
    """SwiGLU feed-forward of width `inter`."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_up = weight(2 * inter, hidden)
        self.down = weight(hidden, inter)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.swiglu(F.linear(x, self.gate_up)), self.down)
