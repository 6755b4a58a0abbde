"""The op: one declaration holds its schema, type rule, reference evaluation and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.optable import FLOAT, Attrs, OpDef, known, require, tensor
from moec.ir.types import TensorType, Type


class SwigluLimited(OpDef):
    """silu(min(gate, limit)) * clip(up, -limit, limit) of x = (gate | up)."""

    name = "swiglu.limited"
    operands = "x"
    attrs = {"limit": FLOAT}  # noqa: RUF012

    def infer(self, t: Sequence[Type], a: Attrs, module: Any) -> list[Type]:
        x = tensor(t[0], "x", 2)
        width = known(x.shape[1], "the width of x")
        require(width % 2 == 0, f"x must hold gate and up side by side, got {x}")
        require(a["limit"] > 0, f"limit must be positive, got {a['limit']}")
        return [x.with_shape(x.shape[0], width // 2)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        gate, up = x[0].chunk(2, -1)
        limit = a["limit"]
        return [ctx.torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Any:
        assert isinstance(r[0], TensorType)
        return r[0].elements() * 8
