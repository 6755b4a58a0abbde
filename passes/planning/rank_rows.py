"""Rows of the cost model for a sharded function: types are those of one rank, exchanges are ops of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

from moec.ir import Function, Op, TensorType
from moec.ir.optable import operand_type
from moec.passes.planning.layout import Layout
from moec.passes.planning.rows import Row, Rows
from moec.passes.planning.sharding import Role

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def rank_layout(layout: Layout) -> Layout:
    """The layout with nothing left to divide inside a replica."""
    return replace(layout, tp=1, dp=layout.dp * layout.tp)


def rank_symbols(function: Function, tokens: int, part: int, top_k: int, balance: float) -> dict[str, int]:
    """Symbols that sharding introduced: rows of a rank's share of the tokens, and of what dispatch brings it."""
    found: dict[str, int] = {}
    own = tokens
    for op in function.ops:
        if int(str(op.attrs.get("micro_batch", 0))) != part:
            continue
        if op.name == "comm.rows":
            own = ceil(tokens / int(str(op.attrs["ranks"])))
            found[str(op.attrs["rows"])] = own
        elif op.name == "comm.dispatch":
            found[str(op.attrs["rows"])] = ceil(own * top_k / balance)
    return found


def rank_rows(rows: Rows, op: Op, role: Role) -> list[Row]:
    """The rows of one op on one rank."""
    kind = op.name.removeprefix("comm.")
    if op.name.startswith("comm.") and kind in COLLECTIVES:
        return _collective(rows, op, kind)
    return _RULES.get(op.name, Rows.of)(rows, op, role)


def _collective(rows: Rows, op: Op, kind: str) -> list[Row]:
    whole = op.results[0].type if kind == "all_gather" else operand_type(op.operands[0])
    assert isinstance(whole, TensorType)
    return [{"op": kind, "bytes": rows.number(whole.nbytes()), "ranks": op.attrs["ranks"]}]


def _exchange(rows: Rows, op: Op, role: Role) -> list[Row]:
    dispatch = op.name == "comm.dispatch"
    sent = operand_type(op.operands[1]) if dispatch else op.results[0].type
    assert isinstance(sent, TensorType)
    tokens, hidden = (rows.number(d) for d in sent.shape)
    dtype = "fp8" if sent.dtype.startswith("fp8") else "f32" if sent.dtype == "f32" else "bf16"
    row: dict[str, Any] = {
        "op": "moe_dispatch" if dispatch else "moe_combine",
        "tokens": ceil(tokens / rows.balance),
        "hidden": hidden,
        "top_k": rows.top_k,
        "experts": op.attrs["slots"],
        "ep": op.attrs["ranks"],
        "dtype": dtype,
    }
    if rows.step.phase != "prefill":
        return [row]
    nodes = -(-int(str(op.attrs["ranks"])) // int(str(op.attrs["per_node"])))
    row |= {"mode": "normal", "max_nodes": min(nodes, int(str(op.attrs.get("node_limit", nodes))))}
    received = ceil(tokens * rows.top_k / rows.balance)
    permute = {"op": "stream", "bytes": 2 * received * hidden * {"fp8": 1, "bf16": 2, "f32": 4}[dtype]}
    return [row, permute] if dispatch else [permute, row]


def _experts(rows: Rows, op: Op, role: Role) -> list[Row]:
    slots, hidden, inter = rows.shape(op, 3)
    row = {"op": "moe_experts", "rows": rows.shape(op, 0)[0], "experts": slots}
    layout = "masked" if rows.step.phase == "decode" else "contiguous"
    return [row | {"hidden": hidden, "inter": inter, "dtype": rows.recipe.product, "layout": layout}]


def _route(rows: Rows, op: Op, role: Role) -> list[Row]:
    experts, hidden = rows.shape(op, 1)
    return [{"op": "router", "tokens": rows.shape(op, 0)[0], "hidden": hidden, "experts": experts}]


def _quantise(rows: Rows, op: Op, role: Role) -> list[Row]:
    *lead, columns = rows.shape(op, 0)
    count = 1
    for d in lead:
        count *= d
    return [{"op": "quantise", "rows": count, "columns": columns}]


_RULES: dict[str, Callable[[Rows, Op, Role], list[Row]]] = {
    "comm.dispatch": _exchange,
    "comm.combine": _exchange,
    "moe.experts": _experts,
    "moe.route": _route,
    "quant.cast": _quantise,
}
