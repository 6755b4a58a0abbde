"""Dynamic quantisation of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moec.ir.dims import Size
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS
from moec.ir.optable import Attr, Attrs, OpDef, TypeRuleError, tensor
from moec.ir.types import QUANTISED, SCALE_BITS, Quant, TensorType, Type


def parse_block(text: str) -> tuple[int, ...]:
    """`1x128` -> (1, 128); raises TypeRuleError."""
    parts = text.split("x")
    if not all(p.isdigit() and len(p) < 8 for p in parts) or not 1 <= len(parts) <= 2:
        raise TypeRuleError(f"granularity must look like 1x128, got {text!r}")
    return tuple(int(p) for p in parts)


QUANT_ATTRS = {
    "dtype": Attr("str", choices=QUANTISED),
    "granularity": Attr("str"),
    "scale": Attr("str", choices=tuple(SCALE_BITS)),
}


def quantised(x: TensorType, a: Attrs) -> TensorType:
    """The type of `x` quantised as the attributes say."""
    block = parse_block(str(a["granularity"]))
    if len(block) > len(x.shape):
        raise TypeRuleError(f"granularity {a['granularity']} has more dims than {x}")
    return replace(x, dtype=str(a["dtype"]), quant=Quant(str(a["scale"]), block))


class QuantCast(OpDef):
    """Quantise activations on the fly: one scale per block, `amax / max(dtype)`, rounded up to 2^n first for ue8m0."""

    name = "quant.cast"
    operands = "x"
    attrs = QUANT_ATTRS

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [quantised(tensor(t[0], "x", dtypes=FLOATS), a)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        from moec.ir.numeric import quantise

        return [quantise(x[0], str(a["dtype"]), parse_block(str(a["granularity"])), str(a["scale"]))]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * 3
