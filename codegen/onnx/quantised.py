"""Activations quantised on the fly as standard ONNX ops: rounded to the format and multiplied by their scales again."""

from __future__ import annotations

from math import log
from typing import ClassVar

from onnx import TensorProto

from moec.codegen.onnx.graph import Graph
from moec.errors import InputError
from moec.ir import Op, TensorType
from moec.ir.numeric import LARGEST
from moec.ir.ops.quant import parse_block

FLOAT8 = {"fp8_e4m3": TensorProto.FLOAT8E4M3FN, "fp8_e5m2": TensorProto.FLOAT8E5M2}
TINY = 2.0**-126
"""The least scale: of a block of tiny values."""


class CastWithoutExport(InputError):
    """A quantisation that standard ops do not express here."""

    template: ClassVar[str] = "activations cast to {type} have no ONNX form: export writes {known}, i8"


def cast(g: Graph, op: Op, x: list[str]) -> list[str]:
    """The values that the quantised activations stand for: one scale for each block of a row, or for all rows."""
    t, dtype, scale_format = op.results[0].type, str(op.attrs["dtype"]), str(op.attrs["scale"])
    assert isinstance(t, TensorType)
    *rows, size = parse_block(str(op.attrs["granularity"]))
    width, whole = int(t.shape[-1]), bool(rows) and all(r == 0 for r in rows)  # type: ignore[arg-type]
    if dtype not in (*FLOAT8, "i8") or scale_format not in ("f32", "ue8m0") or not (whole or all(r == 1 for r in rows)):
        raise CastWithoutExport(type=t, known=", ".join(FLOAT8))
    size = size or width
    blocks = -(-width // size)
    value = x[0]
    if blocks * size != width:
        ends = [0] * (2 * len(t.shape))
        ends[-1] = blocks * size - width
        value = g("Pad", value, g.const(ends))
    lead = len(t.shape) - 1
    value = g.reshape(value, *[0] * lead, blocks, size)
    axes = [lead + 1, *(range(lead - len(rows), lead) if whole else ())]
    most = g("ReduceMax", g("Abs", value), g.const(axes), keepdims=1)
    scale = g("Div", most, g.f32(LARGEST[dtype]))
    if scale_format == "ue8m0":
        scale = _power_of_two(g, scale)
    scale = g("Where", g("Greater", most, g.f32(0.0)), g("Max", scale, g.f32(TINY)), g.f32(1.0))
    value = g("Div", value, scale)
    if dtype == "i8":
        value = g("Clip", g("Round", value), g.f32(-127.0), g.f32(127.0))
    else:
        value = g.cast(g("Cast", value, to=FLOAT8[dtype], saturate=1), "float32")
    value = g.reshape(g("Mul", value, scale), *[0] * lead, blocks * size)
    if blocks * size != width:
        value = g("Slice", value, g.const([0]), g.const([width]), g.const([-1]))
    return [value]


def _power_of_two(g: Graph, scale: str) -> str:
    """The least power of two that is no less: exact, whatever the logarithm's last bit is."""
    exponent = g("Round", g("Mul", g("Log", g("Max", scale, g.f32(TINY))), g.f32(1 / log(2))))
    power = g("Pow", g.f32(2.0), exponent)
    power = g("Where", g("Less", power, scale), g("Mul", power, g.f32(2.0)), power)
    half = g("Mul", power, g.f32(0.5))
    return str(g("Where", g("GreaterOrEqual", half, scale), half, power))
