"""Norms over the last dim, alone and with the residual sum before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Size
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS
from moec.ir.optable import FLOAT, Attrs, OpDef, require, same, tensor
from moec.ir.types import Type


class NormRms(OpDef):
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019): `y = x / sqrt(mean(x²) + eps) · w`."""

    name = "norm.rms"
    operands = "x w"
    attrs = {"eps": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, w = tensor(t[0], "x", dtypes=FLOATS), tensor(t[1], "w", 1)
        same(x.shape[-1], w.shape[0], "width of x and w")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [rms(x[0], x[1], a["eps"])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 4


class NormLayer(OpDef):
    """Layer norm over the last dim (Ba et al. 2016): `y = (x - mean(x)) / sqrt(var(x) + eps) · w + b`."""

    name = "norm.layer"
    operands = "x w b"
    attrs = {"eps": FLOAT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x", dtypes=FLOATS)
        for i, what in ((1, "w"), (2, "b")):
            same(x.shape[-1], tensor(t[i], what, 1).shape[0], f"width of x and {what}")
        return [x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        centred = x[0] - x[0].mean(-1, keepdim=True)
        return [rms(centred, x[1], a["eps"]) + x[2]]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 7


class AddNormRms(OpDef):
    """Residual sum and its norm in one pass: `s = x + residual`, `y = rms(s) · w`."""

    name = "norm.add_rms"
    operands = "x residual w"
    attrs = {"eps": FLOAT}
    results = "s y"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x", dtypes=FLOATS)
        require(t[1] == x, f"x and residual differ: {x} and {t[1]}")
        same(x.shape[-1], tensor(t[2], "w", 1).shape[0], "width of x and w")
        return [x, x]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        s = x[0] + x[1]
        return [s, rms(s, x[2], a["eps"])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 5


def rms(x: Any, w: Any, eps: Any) -> Any:
    """RMS norm of a torch tensor over its last dim."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w
