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


class Computed(nn.Parameter):
    """A parameter that no checkpoint holds: op `made_by` of a weight program makes it, once for all layers."""

    symbol: str
    made_by: str
    attrs: dict[str, Any]


def computed(symbol: str, made_by: str, size: tuple[int, ...], **attrs: Any) -> Computed:
    """A `Computed` parameter of `size`; equal symbols are one weight of the module."""
    made = Computed(torch.empty(size, device="meta"), requires_grad=False)
    made.symbol, made.made_by, made.attrs = symbol, made_by, attrs
    return made


class Layers(nn.Module):
    """Turns `first..last` of equal layers, traced once: `body(layer, x, *state)` returns the next x.

    A turn is one layer, or the `period` layers of a `Turn`; then turn l begins with layer `origin + l * period`.
    """

    def __init__(self, body: nn.Module, first: int, last: int) -> None:
        super().__init__()
        self.body = body
        self.first = first
        self.last = last

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        """Never runs: the tracer turns it into one `repeat`."""
        raise TypeError("model definitions are traced, not run; use moec.trace(...)")


class Turn(nn.Module):
    """Several unlike layers that make up one turn of a stack; layer i is number `l * period + origin + i`."""

    def __init__(self, parts: list[nn.Module], origin: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.origin = origin

    def numbering(self, part: int) -> tuple[int, int]:
        """Scale and offset of a part's layer number."""
        return len(self.parts), self.origin + part

    def forward(self, layer: Tensor, x: Tensor, kv: Tensor, seq: Tensor, pos: Tensor, pages: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):
            x = part(F.layer_number(layer, *self.numbering(i)), x, kv, seq, pos, pages)
        return x


class Mlp(nn.Module):
    """Gated feed-forward of width `inter`; `glu`: attributes of `swiglu`."""

    def __init__(self, hidden: int, inter: int, bias: bool = False, glu: Any = ()) -> None:
        super().__init__()
        self.glu = dict(glu)
        self.gate_up = weight(2 * inter, hidden)
        self.down = weight(hidden, inter)
        self.gate_up_bias = weight(2 * inter) if bias else None
        self.down_bias = weight(hidden) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.swiglu(F.linear(x, self.gate_up, self.gate_up_bias), **self.glu), self.down, self.down_bias)
