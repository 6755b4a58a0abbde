"""What each row-wise op adds to a kernel, but for rotations and caches (row_heads.py)."""

from __future__ import annotations

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import SCALES, tensor_of, width
from moec.codegen.triton.fused.groups import GROUP
from moec.codegen.triton.fused.products import SwiGlu
from moec.codegen.triton.fused.row_writer import Pairs, RowWriter, Shape, Tile
from moec.codegen.triton.specs.recipe import power_of_two
from moec.ir import Op, Value, WeightRef

POINTWISE = {
    "exp": "tl.exp({0})",
    "relu": "tl.maximum({0}, 0.0)",
    "sigmoid": "tl.sigmoid({0})",
    "silu": "{0} * tl.sigmoid({0})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
}


def embed(w: RowWriter, op: Op) -> None:
    gather(w, op, w.input(op, 0), op.operands[1])


def rows_gather(w: RowWriter, op: Op) -> None:
    gather(w, op, w.input(op, 1), op.operands[0])


def gather(w: RowWriter, op: Op, ids: str, table: Value | WeightRef) -> None:
    """The row that `ids` names."""
    shape = Shape(width(table))
    line = w.let(f"tl.load({ids} + row).to(tl.int64)", "line")
    step = w.distance(table) if isinstance(table, Value) else str(shape.columns)
    w.env[op.result] = Tile(w.load(f"{w.data(table)} + {line} * {step}", shape), shape)


def moe_combine(w: RowWriter, op: Op) -> None:
    """Rows of a token's experts, from wherever the dispatch put them."""
    rows, order = op.operands[:2]
    assert isinstance(rows, Value) and isinstance(order, Value)
    if tensor_of(rows).quant is not None:
        raise NoKernel(op=op.name, reason=f"%{rows.name} is quantised")
    top_k, shape = width(order), Shape(width(rows))
    places, source, step = w.data(order), w.data(rows), w.distance(rows)
    at = w.at(shape)
    total = w.let(f"tl.zeros({at}.shape, dtype=tl.float32)", "total")
    share = f"tl.load({w.input(op, 2)} + row * {top_k} + k) * " if len(op.operands) == 3 else ""
    w.body += [
        f"for k in tl.static_range({top_k}):",
        f"    place = tl.load({places} + row * {top_k} + k).to(tl.int64)",
        f"    part = tl.load({source} + place * {step} + {at}, mask={shape.inside} & (place >= 0), other=0.0)",
        f"    {total} += {share}part.to(tl.float32)",
    ]
    w.env[op.result] = Tile(total, shape)


def moe_weigh(w: RowWriter, op: Op) -> None:
    """One program a pair of token and expert: the token's row times the weight goes to the pair's place."""
    rows, order, weights = op.operands
    assert isinstance(rows, Value) and isinstance(order, Value) and isinstance(weights, Value)
    shape = Shape(width(rows))
    row = w.load(w.row_of(rows, f"(row // {width(order)})"), shape)
    weight = w.let(f"tl.load({w.data(weights)} + row)", "weight")
    w.to = w.let(f"tl.load({w.data(order)} + row).to(tl.int64)", "place")
    w.env[op.result] = Tile(w.let(f"{row} * {weight}"), shape)


def add(w: RowWriter, op: Op) -> None:
    a, b = (w.tile(o) for o in op.operands)
    w.env[op.result] = Tile(w.let(f"{a.name} + {b.name}"), a.shape)


def scale(w: RowWriter, op: Op) -> None:
    x = w.tile(op.operands[0])
    w.env[op.result] = Tile(w.let(f"{x.name} * {op.attrs['factor']}"), x.shape)


def clamp(w: RowWriter, op: Op) -> None:
    x, limit = w.tile(op.operands[0]), op.attrs["limit"]
    w.env[op.result] = Tile(w.let(f"tl.minimum(tl.maximum({x.name}, -{limit}), {limit})"), x.shape)


def pointwise(w: RowWriter, op: Op) -> None:
    x = w.tile(op.operands[0])
    w.env[op.result] = Tile(w.let(POINTWISE[str(op.attrs["function"])].format(x.name)), x.shape)


def gate_rows(w: RowWriter, op: Op) -> None:
    x, gate = w.tile(op.operands[0]), op.operands[1]
    assert isinstance(gate, Value)
    factor = w.let(f"tl.sigmoid(tl.load({w.row_of(gate)}).to(tl.float32))", "gate")
    w.env[op.result] = Tile(w.let(f"{x.name} * {factor}"), x.shape)


def norm_rms(w: RowWriter, op: Op) -> None:
    x = w.env.get(op.operands[0])  # type: ignore[arg-type]
    if isinstance(x, Pairs):
        w.env[op.result] = normed_pairs(w, x, op)
    else:
        w.env[op.result] = normed(w, w.tile(op.operands[0]), op.operands[1], op)


def norm_layer(w: RowWriter, op: Op) -> None:
    x = w.tile(op.operands[0])
    mean = w.let(over_columns(f"{x.name}", x.shape), "mean")
    centred = Tile(w.let(f"tl.where({x.shape.inside}, {x.name} - {mean}, 0.0)"), x.shape)
    y = normed(w, centred, op.operands[1], op)
    w.env[op.result] = Tile(w.let(f"{y.name} + {w.vector(op.operands[2], x.shape)}"), x.shape)


def norm_add_rms(w: RowWriter, op: Op) -> None:
    a, b = (w.tile(o) for o in op.operands[:2])
    total = Tile(w.let(f"{a.name} + {b.name}"), a.shape)
    w.env[op.results[0]] = total
    w.env[op.results[1]] = normed(w, total, op.operands[2], op)


def over_columns(text: str, shape: Shape) -> str:
    """The mean over the columns, of every head where there are several."""
    if shape.heads:
        return f"(tl.sum({text}, 1) / {shape.columns})[:, None]"
    return f"tl.sum(tl.sum({text}, 1), 0) / {shape.columns}"


def normed(w: RowWriter, x: Tile, weight: Value | WeightRef, op: Op) -> Tile:
    """Over the root of the mean square, times the weight."""
    mean = w.let(over_columns(f"{x.name} * {x.name}", x.shape), "mean")
    factor = w.vector(weight, x.shape)
    return Tile(w.let(f"{x.name} * (1.0 / tl.sqrt_rn({mean} + {op.attrs['eps']})) * {factor}"), x.shape)


def normed_pairs(w: RowWriter, x: Pairs, op: Op) -> Pairs:
    """The norm of heads that were rotated as a whole."""
    if x.dims != x.shape.columns:
        raise NoKernel(op=op.name, reason="a part of the heads is rotated in the same kernel")
    squares = f"tl.sum({x.first} * {x.first} + {x.second} * {x.second}, 1)"
    mean = w.let(f"({squares} / {x.dims})[:, None]", "mean")
    factor = w.let(f"1.0 / tl.sqrt_rn({mean} + {op.attrs['eps']})")
    parts = []
    for part, at in ((x.first, f"first{x.suffix}"), (x.second, f"second{x.suffix}")):
        weight = w.let(
            f"tl.load({w.data(op.operands[1])} + {at}, mask=pair{x.suffix} < {x.dims // 2}, other=0.0).to(tl.float32)"
        )
        parts.append(w.let(f"{part} * {factor} * {weight}"))
    return Pairs(parts[0], parts[1], x.suffix, x.shape, op.result, x.offset, x.dims)


def swiglu(w: RowWriter, op: Op) -> None:
    x = op.operands[0]
    assert isinstance(x, Value)
    shape = Shape(width(op.result))
    base = w.row_of(x)
    gate, up = w.load(base, shape), w.load(f"{base} + {shape.columns}", shape)
    w.env[op.result] = Tile(w.let(SwiGlu.of(op.attrs).text(gate, up)), shape)


def quant_cast(w: RowWriter, op: Op) -> None:
    x, to = w.tile(op.operands[0]), tensor_of(op.result)
    assert to.quant is not None
    if to.quant.block != (1, GROUP) or to.dtype != "fp8_e4m3" or x.shape.heads:
        raise NoKernel(op=op.name, reason=f"granularity {op.attrs['granularity']} of {to.dtype} (1x{GROUP} E4M3 has)")
    groups = -(-x.shape.columns // GROUP)
    scale = w.argument(f"{w.short(op.result)}_scale_ptr", "*" + SCALES[to.quant.scale], "scale", op.result)
    at = w.at(x.shape)
    power = to.quant.scale == "ue8m0"
    index = w.let(f"tl.arange(0, {power_of_two(groups)})", "g")
    base, kind = w.data(op.result), f"{w.data(op.result)}.dtype.element_ty"
    q = w.let(
        f"quantise_groups({x.name}, {scale}, {w.to} * {groups} + {index}, {index} < {groups}, {power}, {kind})", "q"
    )
    w.body.append(f"tl.store({base} + {w.to} * {x.shape.columns} + {at}, {q}, mask={x.shape.inside})")


OPS = {
    "embed": embed,
    "rows.gather": rows_gather,
    "moe.combine": moe_combine,
    "moe.weigh": moe_weigh,
    "add": add,
    "scale": scale,
    "clamp": clamp,
    "tensor.pointwise": pointwise,
    "gate.rows": gate_rows,
    "norm.rms": norm_rms,
    "norm.layer": norm_layer,
    "norm.add_rms": norm_add_rms,
    "swiglu": swiglu,
    "quant.cast": quant_cast,
}
