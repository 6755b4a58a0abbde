"""From an op of the IR to rows of the cost model, for one device of a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil
from typing import Any

from moec.ir import CacheType, Dim, Op, TensorType, Type, Value, WeightRef
from moec.ir.dims import Size
from moec.ir.optable import OPS, operand_type
from moec.passes.planning.layout import Layout
from moec.passes.planning.precision import Recipe
from moec.passes.planning.sharding import Role
from moec.targets import Target

Row = Mapping[str, Any]
COMMUNICATION = ("moe_dispatch", "moe_combine", "all_reduce", "all_gather")
_WIRE_BYTES = 2


@dataclass(frozen=True)
class Step:
    """One step of one attention replica: `sequences` requests with `new` tokens each, attending to `context`."""

    phase: str
    sequences: int
    new: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens that the replica computes in the step."""
        return self.sequences * self.new

    @property
    def symbols(self) -> dict[str, int]:
        """Values of the IR's symbols."""
        cached = self.sequences * self.context
        b = self.sequences
        return {"T": self.tokens, "S": cached, "C": self.context, "B": b, "R": b, "N": 1, "P": 1}


@dataclass
class Rows:
    """Rows of the ops of a step. Remembers which values are quantised already: each is quantised once.

    `balance` is mean over maximum of the rows that devices receive: the busiest device sets the time.
    """

    step: Step
    layout: Layout
    recipe: Recipe
    target: Target
    balance: float
    top_k: int
    top_groups: int | None
    quantised: set[Value] = field(default_factory=set)

    def of(self, op: Op, role: Role) -> list[Row]:
        """The rows of one call; none for a view."""
        return _RULES.get(op.name, _stream)(self, op, role)

    def number(self, size: Size) -> int:
        """A size under the step's symbols."""
        return size if isinstance(size, int) else bind_fast(size, self.step.symbols)

    def shape(self, op: Op, position: int) -> tuple[int, ...]:
        """The concrete shape of an operand."""
        t = operand_type(op.operands[position])
        assert isinstance(t, TensorType)
        return tuple(self.number(d) for d in t.shape)

    @property
    def own_tokens(self) -> int:
        """Tokens of one device where a replica's devices divide them."""
        return -(-self.step.tokens // self.layout.tp)

    @property
    def expert_rows(self) -> int:
        """Token-expert pairs at the busiest device."""
        return ceil(self.own_tokens * self.top_k / self.balance)

    @property
    def exchanged(self) -> int:
        """Tokens of an exchange that lasts as long as the one of the busiest device."""
        return ceil(self.own_tokens / self.balance)


def bind_fast(size: Dim, values: Mapping[str, int]) -> int:
    """`size.bind(values)`, compiled once per expression."""
    names, compute = _compiled(size)
    return int(compute(*(values[name] for name in names)))


def bound_type(t: Type, values: Mapping[str, int]) -> Type:
    """The type with concrete dims: its sizes are then plain arithmetic, not symbolic."""
    if isinstance(t, TensorType | CacheType):
        return replace(t, shape=tuple(d if isinstance(d, int) else bind_fast(d, values) for d in t.shape))
    return t


@lru_cache(maxsize=4096)
def _compiled(size: Dim) -> tuple[list[str], Callable[..., float]]:
    import sympy

    symbols = sorted(size.expr.free_symbols, key=str)
    return [str(s) for s in symbols], sympy.lambdify(symbols, size.expr, modules="math")


def _linear(rows: Rows, op: Op, role: Role) -> list[Row]:
    m, k = rows.shape(op, 0)
    n = rows.shape(op, 1)[0]
    tp = rows.layout.tp
    if role == "tokens":
        m = -(-m // tp)
    elif role == "column":
        n //= tp
    elif role == "row":
        k //= tp
    out = rows.recipe.head if op.attrs.get("out") == "f32" else rows.recipe.product
    row: dict[str, Any] = {"op": "gemm", "m": m, "n": n, "k": k, "dtype": out}
    x = op.operands[0]
    plain = isinstance(x, Value) and isinstance(x.type, TensorType) and x.type.quant is None
    if out == "fp8_block" and rows.target.device.fp8.matrix and plain and x not in rows.quantised:
        assert isinstance(x, Value)
        rows.quantised.add(x)
        row["quantise_a"] = True
    if role == "row" and tp > 1:
        return [row, {"op": "all_reduce", "bytes": m * n * _WIRE_BYTES, "ranks": tp}]
    return [row]


def _linear_heads(rows: Rows, op: Op, role: Role) -> list[Row]:
    tokens, heads, k = rows.shape(op, 0)
    n = rows.number(op.result.type.shape[2])  # type: ignore[union-attr]
    row = {"op": "grouped_gemm", "groups": heads // rows.layout.tp, "m_per_group": tokens, "n": n, "k": k}
    # Slices of a head do not follow the 128-wide blocks, so these products stay in BF16 (as in SGLang and vLLM).
    return [{**row, "dtype": "bf16", "layout": "masked"}]


def _attention(rows: Rows, op: Op, role: Role) -> list[Row]:
    _, heads, width = rows.shape(op, 0)
    step = rows.step
    context = step.context
    if OPS[op.name].operands.endswith("chosen?") and len(op.operands) == len(OPS[op.name].operands.split()):
        context = min(context, max(rows.shape(op, len(op.operands) - 1)[1], step.new))
    row: dict[str, Any] = {"batch": step.sequences, "context": context, "heads": heads // rows.layout.tp}
    if op.name == "attn.mla":
        nope = int(op.attrs["nope"])  # type: ignore[arg-type]
        row |= {"nope": nope, "rope": width - nope, "v_head": op.attrs["v"], "form": "plain"}
        return [{"op": "mla_prefill", "new_tokens": step.new, **row}]
    row |= {"kv_rank": width, "rope": rows.shape(op, 1)[2]}
    if step.phase == "decode":
        quantised = any(isinstance(o.type, CacheType) and o.type.quant for o in op.operands)
        return [{"op": "mla_decode", "queries": step.new, "kv_dtype": "fp8" if quantised else "bf16", **row}]
    return [{"op": "mla_prefill", "new_tokens": step.new, "form": "absorbed", **row}]


def _grouped(rows: Rows, op: Op, role: Role) -> list[Row]:
    """Grouped heads: prefill computes as with a key for each head, decode reads each head of keys and values once."""
    _, heads, dim = rows.shape(op, 0)
    step, tp = rows.step, rows.layout.tp
    bounds = [int(op.attrs[k]) for k in ("window", "chunk") if k in op.attrs]  # type: ignore[arg-type]
    context = min([step.context, *(max(b, step.new) for b in bounds)])
    row: dict[str, Any] = {"batch": step.sequences, "context": context, "heads": heads // tp, "v_head": op.attrs["v"]}
    if step.phase == "decode":
        groups = max(1, int(op.attrs["kv_heads"]) // tp)  # type: ignore[arg-type]
        return [{"op": "gqa_decode", "kv_heads": groups, "dim": dim, "queries": step.new, **row}]
    return [{"op": "mla_prefill", "new_tokens": step.new, "nope": dim, "rope": 0, "form": "plain", **row}]


def _route(rows: Rows, op: Op, role: Role) -> list[Row]:
    experts, hidden = rows.shape(op, 1)
    return [{"op": "router", "tokens": rows.own_tokens, "hidden": hidden, "experts": experts}]


def _experts(rows: Rows, op: Op, role: Role) -> list[Row]:
    _, hidden, inter = rows.shape(op, 3)
    row = {"op": "moe_experts", "rows": rows.expert_rows, "experts": rows.layout.slots_per_device}
    layout = "masked" if rows.step.phase == "decode" else "contiguous"
    return [row | {"hidden": hidden, "inter": inter, "dtype": rows.recipe.product, "layout": layout}]


def _exchange(rows: Rows, op: Op, role: Role) -> list[Row]:
    layout, dispatch = rows.layout, op.name == "moe.dispatch"
    hidden = rows.shape(op, 0)[1]
    if layout.ep == 1:
        found = _stream(rows, op, role)
    else:
        row: dict[str, Any] = {"op": "moe_dispatch" if dispatch else "moe_combine", "tokens": rows.exchanged}
        row |= {"hidden": hidden, "top_k": rows.top_k, "experts": layout.slots, "ep": layout.ep}
        row |= {"dtype": rows.recipe.wire if dispatch else "bf16"}
        if rows.step.phase == "prefill":
            nodes = -(-layout.ep // rows.target.node.devices)
            row |= {"mode": "normal", "max_nodes": min(nodes, rows.top_groups or nodes)}
            # This mode delivers a copy for each device: further kernels lay rows out by expert, and add them up.
            element = 1 if dispatch and rows.recipe.wire != "bf16" else 2
            permute = {"op": "stream", "bytes": 2 * rows.expert_rows * hidden * element}
            found = [row, permute] if dispatch else [permute, row]
        else:
            found = [row]
    if not dispatch and layout.tp > 1:
        found.append({"op": "all_gather", "bytes": rows.step.tokens * hidden * _WIRE_BYTES, "ranks": layout.tp})
    return found


def _stream(rows: Rows, op: Op, role: Role) -> list[Row]:
    symbols = rows.step.symbols
    types = [bound_type(operand_type(o), symbols) for o in op.operands]
    results = [bound_type(r.type, symbols) for r in op.results]
    rule = OPS[op.name]
    moved = rows.number(rule.bytes_read(types, results, op.attrs) + rule.bytes_written(types, results, op.attrs))
    if not moved:
        return []
    weights = sum(
        rows.number(o.type.nbytes())
        for o in op.operands
        if isinstance(o, WeightRef) and isinstance(o.type, TensorType) and op.name.startswith("norm")
    )
    flops = rows.number(rule.flops(types, results, op.attrs))
    parts = 1 if role == "whole" else rows.layout.tp
    return [{"op": "stream", "bytes": weights + -(-(moved - weights) // parts), "flops": -(-flops // parts)}]


_RULES: dict[str, Callable[[Rows, Op, Role], list[Row]]] = {
    "linear": _linear,
    "linear.heads": _linear_heads,
    "attn.mla": _attention,
    "attn.mla_absorbed": _attention,
    "attn.heads": _grouped,
    "moe.route": _route,
    "moe.experts": _experts,
    "moe.dispatch": _exchange,
    "moe.combine": _exchange,
}
"""Ops with rows of their own; every other op is a memory-bound kernel over the bytes of the op table."""
