"""Emitters of the ops on rows of activations: embedding, norms, products, element-wise; see `emit`."""

from __future__ import annotations

from typing import Any

from moec.codegen.tvm import elementwise, embed, emit_heads, grouped, linear, norm, quantise, rope
from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter, copy, format_of, glu, integer, matrix, number
from moec.codegen.tvm.vector import KernelSpecError
from moec.ir import Op, TensorType, Value, WeightRef
from moec.ir.module import Operand


def _embed(e: FunctionEmitter, op: Op) -> None:
    ids, table = op.operands
    y = e.place(op.result)
    assert isinstance(table.type, TensorType)
    spec = embed.EmbedSpec(y.shape[1], table.type.dtype, y.shape[0], y.ld)
    e.run(embed.build_embed, spec, e.at(ids), *e.weight(table), e.at(op.result), e.count(op.result))


def _norm(e: FunctionEmitter, op: Op) -> None:
    x, w = op.operands
    y = e.place(op.result)
    if len(y.shape) == 3:
        emit_heads.norm(e, op)
        return
    spec = norm.RmsNormSpec(y.shape[1], number(op, "eps"), y.shape[0], e.place(x).ld, y.ld)
    e.run(norm.build_rms_norm, spec, e.at(x), *e.weight(w), e.at(op.result), e.count(op.result))


def _add_norm(e: FunctionEmitter, op: Op) -> None:
    x, residual, w = op.operands
    total, y = op.results
    p = e.place(y)
    spec = norm.AddRmsNormSpec(
        p.shape[1], number(op, "eps"), p.shape[0], e.place(x).ld, e.place(residual).ld, e.place(total).ld, p.ld
    )
    e.run(norm.build_add_rms_norm, spec, e.at(x), e.at(residual), *e.weight(w), e.at(total), e.at(y), e.count(y))


def linear_call(
    e: FunctionEmitter, x: Any, ldx: int, w: Operand, bias: list[Any], y: Any, ldy: int, most: int, count: Any
) -> None:
    """A product with a matrix weight: rows `ldx` apart at `x` to rows `ldy` apart at `y`."""
    n, k = matrix(w.type)
    spec = linear.LinearSpec(n, k, format_of(w.type), ldx, ldy, most, bool(bias))
    scratch = e.scratch(linear.scratch_size(spec, e.p.machine))
    e.run(linear.build, spec, x, *e.weight(w), *bias, y, scratch, count)


def _linear(e: FunctionEmitter, op: Op) -> None:
    x, w = op.operands[:2]
    bias = e.weight(op.operands[2]) if len(op.operands) == 3 else []
    y = e.place(op.result)
    linear_call(e, e.at(x), e.place(x).ld, w, bias, e.at(op.result), y.ld, y.shape[0], e.count(op.result))


def _linear_heads(e: FunctionEmitter, op: Op) -> None:
    x, w = op.operands
    n, k = matrix(w.type)
    px, py = e.place(x), e.place(op.result)
    spec = grouped.HeadwiseSpec(
        px.shape[1], n, k, format_of(w.type), px.ld, px.strides[1], py.ld, py.strides[1], px.shape[0]
    )
    scratch = e.scratch(grouped.scratch_size(spec, e.p.machine))
    e.run(grouped.build_headwise, spec, e.at(x), *e.weight(w), e.at(op.result), scratch, e.count(op.result))


def _add(e: FunctionEmitter, op: Op) -> None:
    a, b = op.operands
    y = e.place(op.result)
    spec = elementwise.AddSpec(y.shape[1], y.shape[0], e.place(a).ld, e.place(b).ld, y.ld)
    e.run(elementwise.build_add, spec, e.at(a), e.at(b), e.at(op.result), e.count(op.result))


def _swiglu(e: FunctionEmitter, op: Op) -> None:
    y = e.place(op.result)
    spec = elementwise.SwigluSpec(y.shape[1], y.shape[0], e.place(op.operands[0]).ld, y.ld, **glu(op))
    e.run(elementwise.build_swiglu, spec, e.at(op.operands[0]), e.at(op.result), e.count(op.result))


def _rows_gather(e: FunctionEmitter, op: Op) -> None:
    x, rows = op.operands
    y = e.place(op.result)
    spec = elementwise.GatherRowsSpec(y.shape[1], y.shape[0], e.place(x).ld, y.ld)
    e.run(elementwise.build_gather_rows, spec, e.at(x), e.at(rows), e.at(op.result), e.count(op.result))


def _rope(e: FunctionEmitter, op: Op) -> None:
    x, pos, table = op.operands
    assert isinstance(x, Value)
    y = e.place(op.result)
    if (y.base, y.offset) != (e.place(x).base, e.place(x).offset):
        copy(e, x, op.result)
    heads, step = (y.shape[1], y.strides[1]) if len(y.shape) == 3 else (1, 0)
    offset, dims = integer(op, "offset"), integer(op, "dims")
    spec = rope.RopeSpec(heads, dims, bool(op.attrs["interleaved"]), y.shape[0], y.ld, step)
    angles = e.weight(table)[0] if isinstance(table, WeightRef) else e.at(table)
    e.run(rope.build_rope, spec, e.at(op.result, offset), angles, e.at(pos), e.count(op.result))


def _quant_cast(e: FunctionEmitter, op: Op) -> None:
    x, y = op.operands[0], e.place(op.result)
    assert isinstance(op.result.type, TensorType)
    spec = quantise_spec(op.result.type, y.shape[1], y.shape[0], e.place(x).ld, y.ld)
    e.run(quantise.build_quantise_rows, spec, e.at(x), e.at(op.result), e.count(op.result))


def quantise_spec(t: TensorType, width: int, most: int, ldx: int, ldy: int) -> quantise.QuantiseSpec:
    """Rounding of `width` columns as type `t` says."""
    assert t.quant is not None
    rows, columns = t.quant.block[-2:]
    if t.dtype != "fp8_e4m3" or rows > 1:
        raise KernelSpecError(kernel="quantise", problem=f"activations of {t}, can round to fp8_e4m3 by row or whole")
    return quantise.QuantiseSpec(width, columns, rows == 0, t.quant.scale == "ue8m0", most, ldx, ldy)


EMITTERS.update(
    {
        "embed": _embed,
        "norm.rms": _norm,
        "norm.add_rms": _add_norm,
        "quant.cast": _quant_cast,
        "linear": _linear,
        "linear.heads": _linear_heads,
        "add": _add,
        "swiglu": _swiglu,
        "rows.gather": _rows_gather,
        "rope": _rope,
    }
)
