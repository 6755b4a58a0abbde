"""Emitting ops: each IR op becomes calls of kernels on places of the arena.

One function an op; a kernel is chosen by the types of the op and built once per distinct spec. What is not here cannot
run on a CPU: `missing_ops` names it before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.arena import Slot
from moec.codegen.tvm import (
    elementwise,
    embed,
    grouped,
    linear,
    mla_decode,
    mla_prefill,
    moe,
    norm,
    quantise,
    rope,
    router,
)
from moec.codegen.tvm.cache import CacheAppendSpec, CacheGatherSpec, CacheLayout, build_cache_append, build_cache_gather
from moec.codegen.tvm.memory import Layout, Place
from moec.codegen.tvm.tir import Kernel, Machine, call, const
from moec.codegen.tvm.vector import KernelSpecError
from moec.ir import CacheType, Dim, Function, Module, Op, TensorType, Value, WeightRef, lane16
from moec.ir.lane16 import Format
from moec.ir.module import Operand
from moec.plugins import plugins

DTYPES = {"f32": "float32", "bf16": "uint16", "i32": "int32"}


@dataclass
class WeightBuffer:
    """A weight as an argument of the program: flat buffers of stored elements and scales, and elements of one layer."""

    data: Any
    scale: Any | None
    layer_elements: int
    layer_scales: int
    first: int


@dataclass
class Program:
    """What all functions of one entry share while it is emitted."""

    machine: Machine
    limits: Mapping[str, int]
    page_size: int
    workspace: Any
    weights: Mapping[str, WeightBuffer]
    rows_of: Mapping[str, Any]
    """Run-time value of each leading symbol: T tokens, R rows, S cached positions."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    scratch_at: int = 0
    scratch_size: int = 0


class FunctionEmitter:
    """Emits the ops of one function into the current builder. `env` holds pointers and indices of its arguments."""

    def __init__(self, program: Program, module: Module, function: Function, layout: Layout, base: int) -> None:
        self.p = program
        self.module = module
        self.layout = layout
        self.base = base
        self.env: dict[Value, Any] = {}
        self.op: Op
        self.function = function
        self.repeat: Callable[[Op, FunctionEmitter], None] | None = None

    def emit(self) -> None:
        """Emit all ops in order."""
        for op in self.function.ops:
            self.op = op
            emitter(op.name)(self, op)

    def finish(self, returned: Value, argument: Value) -> None:
        """Leave the result of a layer where its input stood, for the next layer."""
        place = self.place(returned)
        if place.base is not argument:
            buffer, offset = self.env[argument]
            _copy(self, returned, T.address_of(buffer[offset]), self.place(argument).ld)

    # Addresses.

    def buffer_of(self, value: Value) -> tuple[Any, Any]:
        """Buffer and first element of a value that a layer function takes."""
        place = self.place(value)
        if isinstance(place.base, Slot):
            return self.p.workspace, self.base + place.base.offset + place.offset
        buffer, offset = self.env[place.base]
        return buffer, offset + place.offset

    def place(self, operand: Operand) -> Place:
        """The place of an SSA tensor value."""
        assert isinstance(operand, Value)
        return self.layout.places[operand]

    def at(self, operand: Operand, element: int = 0) -> Any:
        """Pointer to an element of the first row of a value."""
        place = self.place(operand)
        if isinstance(place.base, Slot):
            return T.address_of(self.p.workspace[self.base + place.base.offset + place.offset + element])
        buffer, offset = self.env[place.base]
        return T.address_of(buffer[offset + place.offset + element])

    def temporary(self, index: int) -> Any:
        """Pointer to an extra buffer of the current op."""
        return T.address_of(self.p.workspace[self.base + self.layout.extra[self.op][index].offset])

    def scratch(self, elements: int) -> Any:
        """Pointer to scratch memory that any kernel may use."""
        self.p.scratch_size = max(self.p.scratch_size, elements)
        return T.address_of(self.p.workspace[self.p.scratch_at])

    def weight(self, operand: Operand) -> list[Any]:
        """Pointers to a weight of the current layer: data, and scales when it has them."""
        assert isinstance(operand, WeightRef)
        w = self.p.weights[operand.name]
        layer: Any = const(0, "int64")
        if operand.indices:
            layer = T.Cast("int64", self.env[operand.indices[0]] - w.first)
        out = [T.address_of(w.data[layer * const(w.layer_elements, "int64")])]
        if w.scale is not None:
            out.append(T.address_of(w.scale[layer * const(w.layer_scales, "int64")]))
        return out

    def count(self, operand: Operand) -> Any:
        """Run-time number of rows of a value: `T`, or a multiple such as `T*8`."""
        assert isinstance(operand.type, TensorType)
        size = operand.type.shape[0]
        assert isinstance(size, Dim)
        factor, name = size.expr.as_coeff_Mul()
        return self.p.rows_of[str(name)] * int(factor) if factor != 1 else self.p.rows_of[str(name)]

    def most(self, operand: Operand) -> int:
        """Greatest number of rows of a value."""
        return self.place(operand).shape[0]

    def kernel(self, build: Callable[[Any, Machine], Kernel], spec: Any) -> Kernel:
        """The kernel of a spec, built on first use; notes which op uses it."""
        key = f"{build.__module__}.{build.__name__} {spec}"
        if key not in self.p.kernels:
            self.p.kernels[key] = build(spec, self.p.machine)
        kernel = self.p.kernels[key]
        self.p.uses.setdefault(kernel.name, set()).add(self.op.name)
        return kernel

    def run(self, build: Callable[[Any, Machine], Kernel], spec: Any, *args: Any) -> None:
        """Emit one kernel call."""
        call(self.kernel(build, spec), *args)

    def cache_layout(self, kv: Operand) -> CacheLayout:
        """The layout of the cache that an op uses, and pointer arithmetic's constants."""
        assert isinstance(kv.type, CacheType)
        rank = self.p.limits["rank"]
        width = int(kv.type.shape[3])  # type: ignore[arg-type]
        dtype = "fp8" if kv.type.quant else kv.type.dtype
        beside = self.p.limits["index"]
        return CacheLayout(rank, width - rank - beside, dtype, self.p.limits["N"], self.p.page_size, beside)

    def cache(self, kv: Operand, layer: Operand) -> Any:
        """Pointer to one layer of the cache."""
        assert isinstance(kv, Value) and isinstance(kv.type, CacheType) and isinstance(layer, Value)
        buffer, pages = self.env[kv]
        per_layer = const(pages * self.p.page_size * self.cache_layout(kv).row, "int64")
        return T.address_of(buffer[T.Cast("int64", self.env[layer]) * per_layer])


def format_of(t: Any) -> Format:
    """The storage format of a packed weight type."""
    assert isinstance(t, TensorType)
    return lane16.format_of(t.dtype, t.quant.block[-2] if t.quant else lane16.ROWS)


def matrix(t: Any) -> tuple[int, int]:
    """Rows and columns of a matrix (or of each of a stack)."""
    assert isinstance(t, TensorType)
    return int(t.shape[-2]), int(t.shape[-1])  # type: ignore[arg-type]


def integer(op: Op, name: str) -> int:
    """An attribute of an op that is an integer."""
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def number(op: Op, name: str) -> float:
    """An attribute of an op that is a number."""
    value = op.attrs[name]
    assert isinstance(value, int | float)
    return float(value)


def glu(op: Op) -> dict[str, Any]:
    """The attributes of a gated activation that the op has."""
    act = {"act": str(op.attrs["act"])} if "act" in op.attrs else {}
    return act | {key: number(op, key) for key in ("limit", "alpha", "shift") if key in op.attrs}


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


def _linear_call(
    e: FunctionEmitter, x: Any, ldx: int, w: Operand, bias: list[Any], y: Any, ldy: int, most: int, count: Any
) -> None:
    n, k = matrix(w.type)
    spec = linear.LinearSpec(n, k, format_of(w.type), ldx, ldy, most, bool(bias))
    scratch = e.scratch(linear.scratch_size(spec, e.p.machine))
    e.run(linear.build, spec, x, *e.weight(w), *bias, y, scratch, count)


def _linear(e: FunctionEmitter, op: Op) -> None:
    x, w = op.operands[:2]
    bias = e.weight(op.operands[2]) if len(op.operands) == 3 else []
    y = e.place(op.result)
    _linear_call(e, e.at(x), e.place(x).ld, w, bias, e.at(op.result), y.ld, y.shape[0], e.count(op.result))


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


def _copy(e: FunctionEmitter, x: Value, y: Any, ldy: int) -> None:
    p = e.place(x)
    width = p.strides[0] if len(p.shape) == 3 else p.shape[1]
    spec = elementwise.ScaleSpec(width, 1.0, p.shape[0], p.ld, ldy)
    e.run(elementwise.build_scale, spec, e.at(x), y, e.count(x))


def _rope(e: FunctionEmitter, op: Op) -> None:
    x, pos, table = op.operands
    assert isinstance(x, Value)
    y = e.place(op.result)
    if (y.base, y.offset) != (e.place(x).base, e.place(x).offset):
        _copy(e, x, e.at(op.result), y.ld)
    heads, step = (y.shape[1], y.strides[1]) if len(y.shape) == 3 else (1, 0)
    offset, dims = integer(op, "offset"), integer(op, "dims")
    spec = rope.RopeSpec(heads, dims, bool(op.attrs["interleaved"]), y.shape[0], y.ld, step)
    angles = e.weight(table)[0] if isinstance(table, WeightRef) else e.at(table)
    e.run(rope.build_rope, spec, e.at(op.result, offset), angles, e.at(pos), e.count(op.result))


def _cache_append(e: FunctionEmitter, op: Op) -> None:
    kv, layer, latent, key_rope, seq, pos, pages = op.operands
    spec = CacheAppendSpec(e.cache_layout(kv), e.most(latent), e.place(latent).ld, e.place(key_rope).ld)
    e.run(
        build_cache_append, spec, e.at(latent), e.at(key_rope), e.at(seq), e.at(pos), e.at(pages), e.cache(kv, layer),
        e.count(latent),
    )  # fmt: skip


def _cache_read(e: FunctionEmitter, op: Op) -> None:
    kv, layer, pages, _ = op.operands
    latent = op.results[0]
    spec = CacheGatherSpec(e.cache_layout(kv), e.most(latent), e.place(latent).ld)
    e.run(build_cache_gather, spec, e.at(pages), e.cache(kv, layer), e.at(latent), const(0), e.count(latent))


def _mla(e: FunctionEmitter, op: Op) -> None:
    q, kv, key_rope, _, _, _ = op.operands
    pq, pkv, out = e.place(q), e.place(kv), e.place(op.result)
    nope, v, heads = integer(op, "nope"), integer(op, "v"), pq.shape[1]
    spec = mla_prefill.MlaPrefillSpec(
        heads, nope, pq.shape[2] - nope, v, number(op, "scale"), pq.shape[0], pq.ld, pq.strides[1], pkv.ld, nope + v,
        e.place(key_rope).ld, out.ld, out.strides[1],
    )  # fmt: skip
    scratch = e.scratch(mla_prefill.scratch_elements(spec, e.p.machine))
    start = e.p.rows_of["S"] - e.p.rows_of["T"]
    e.run(
        mla_prefill.build_mla_prefill, spec, e.at(q), e.at(kv), e.at(key_rope), e.at(op.result), scratch, e.count(q),
        start,
    )  # fmt: skip


def _mla_absorbed(e: FunctionEmitter, op: Op) -> None:
    if len(op.operands) == 8:
        emit_heads.mla_sparse(e, op)
        return
    q, q_rope, kv, layer, seq, pos, pages = op.operands
    pq, pr, out = e.place(q), e.place(q_rope), e.place(op.result)
    spec = mla_decode.MlaDecodeSpec(
        pq.shape[1], e.cache_layout(kv), number(op, "scale"), pq.shape[0], pq.ld, pq.strides[1], pr.ld, pr.strides[1],
        out.ld, out.strides[1],
    )  # fmt: skip
    scratch = e.scratch(mla_decode.scratch_elements(spec, e.p.machine))
    e.run(
        mla_decode.build_mla_decode, spec, e.at(q), e.at(q_rope), e.cache(kv, layer), e.at(pages), e.at(seq), e.at(pos),
        e.at(op.result), scratch, e.count(q),
    )  # fmt: skip


def _route(e: FunctionEmitter, op: Op) -> None:
    x, gate = op.operands[:2]
    ids, weights = op.results
    experts, _ = matrix(gate.type)
    logits = e.temporary(0)
    a = op.attrs
    bias = e.weight(op.operands[2]) if len(op.operands) == 3 else []
    inside, bias = (bias, []) if a.get("bias_to") == "logits" else ([], bias)
    _linear_call(e, e.at(x), e.place(x).ld, gate, inside, logits, experts, e.most(x), e.count(x))
    if a["score"] == "sparsemixer":
        emit_heads.sparsemixer(e, op, logits, experts)
        return
    spec = router.RouterSpec(
        experts=experts, top_k=integer(op, "top_k"), score=str(a["score"]), has_bias=bool(bias),
        groups=integer(op, "groups"), top_groups=integer(op, "top_groups"),
        group_score="top2sum" if a["group_score"] == "top2" else "max",
        normalise=bool(a["normalise"]), scale=number(op, "scale"), max_tokens=e.most(x), ld=experts,
    )  # fmt: skip
    scratch = e.scratch(router.scratch_elements(spec, e.p.machine))
    e.run(router.build_moe_route, spec, logits, *bias, e.at(ids), e.at(weights), scratch, e.count(x))


def _quant_cast(e: FunctionEmitter, op: Op) -> None:
    x, y = op.operands[0], e.place(op.result)
    assert isinstance(op.result.type, TensorType)
    spec = _quantise_spec(op.result.type, y.shape[1], y.shape[0], e.place(x).ld, y.ld)
    e.run(quantise.build_quantise_rows, spec, e.at(x), e.at(op.result), e.count(op.result))


def _quantise_spec(t: TensorType, width: int, most: int, ldx: int, ldy: int) -> quantise.QuantiseSpec:
    """Rounding of `width` columns as type `t` says."""
    assert t.quant is not None
    rows, columns = t.quant.block[-2:]
    if t.dtype != "fp8_e4m3" or rows > 1:
        raise KernelSpecError(kernel="quantise", problem=f"activations of {t}, can round to fp8_e4m3 by row or whole")
    return quantise.QuantiseSpec(width, columns, rows == 0, t.quant.scale == "ue8m0", most, ldx, ldy)


def _dispatch(e: FunctionEmitter, op: Op) -> None:
    ids = op.operands[1]
    _, offsets, order = op.results
    spec = moe.SortSpec(integer(op, "experts"), e.place(ids).shape[1])
    e.run(moe.build_sort, spec, e.at(ids), e.at(offsets), e.temporary(0), e.at(order), e.count(ids))


def _experts(e: FunctionEmitter, op: Op) -> None:
    rows, offsets, up, down, *biases = op.operands
    assert isinstance(rows, Value)
    source = e.layout.places[rows]
    # Rows straight from the dispatch are gathered by the product; others lie there already.
    gather = bool(source.keeps)
    index = [T.address_of(e.p.workspace[e.base + source.keeps[-1].offset])] if gather else []
    experts = int(up.type.shape[0])  # type: ignore[union-attr, arg-type]
    (wide, k), (hidden, inter) = matrix(up.type), matrix(down.type)
    y = e.place(op.result)
    # Of rows that other ranks sent one expert may own as many as all ranks have tokens.
    assert isinstance(rows.type, TensorType)
    tokens = e.p.limits["G" if str(rows.type.shape[0]) == "D" else "T"]
    first = grouped.GroupedSpec(experts, wide, k, format_of(up.type), source.ld, wide, y.shape[0], tokens, gather)
    second = grouped.GroupedSpec(experts, hidden, inter, format_of(down.type), inter, y.ld, y.shape[0], tokens)
    scratch = e.scratch(max(grouped.scratch_size(s, e.p.machine) for s in (first, second)))
    e.run(grouped.build_grouped, first, e.at(rows), *index, e.at(offsets), *e.weight(up), e.temporary(0), scratch)
    if biases:
        emit_heads.group_bias(e, e.temporary(0), offsets, biases[0], wide)
    act = elementwise.SwigluSpec(inter, y.shape[0], wide, inter, **glu(op))
    e.run(elementwise.build_swiglu, act, e.temporary(0), e.temporary(1), e.count(op.result))
    if isinstance(rows.type, TensorType) and rows.type.quant:
        rounding = _quantise_spec(rows.type, inter, y.shape[0], inter, inter)
        e.run(quantise.build_quantise_rows, rounding, e.temporary(1), e.temporary(1), e.count(op.result))
    e.run(grouped.build_grouped, second, e.temporary(1), e.at(offsets), *e.weight(down), e.at(op.result), scratch)
    if biases:
        emit_heads.group_bias(e, e.at(op.result), offsets, biases[1], y.ld)


def _combine(e: FunctionEmitter, op: Op) -> None:
    rows, order, *weights = op.operands
    y = e.place(op.result)
    spec = moe.CombineSpec(y.shape[1], e.place(order).shape[1], e.place(rows).ld, y.ld, weighted=bool(weights))
    given = [e.at(w) for w in weights]
    e.run(moe.build_combine, spec, e.at(rows), e.at(order), *given, e.at(op.result), e.count(op.result))


def _repeat(e: FunctionEmitter, op: Op) -> None:
    assert e.repeat is not None
    e.repeat(op, e)


def _view(e: FunctionEmitter, op: Op) -> None:
    """Views cost nothing."""


EMITTERS: dict[str, Callable[[FunctionEmitter, Op], None]] = {
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
    "cache.append": _cache_append,
    "cache.read": _cache_read,
    "attn.mla": _mla,
    "attn.mla_absorbed": _mla_absorbed,
    "moe.route": _route,
    "moe.dispatch": _dispatch,
    "moe.experts": _experts,
    "moe.combine": _combine,
    "repeat": _repeat,
    "split": _view,
    "unflatten": _view,
    "flatten": _view,
}


@cache
def _plugged() -> dict[str, Callable[[FunctionEmitter, Op], None]]:
    """Emitters of installed packages (entry points `moec.cpu_kernels`, named as their ops), found at the first use."""
    return dict(plugins("moec.cpu_kernels", EMITTERS))


def emitter(op: str) -> Callable[[FunctionEmitter, Op], None]:
    """What emits an op; `missing_ops` has been asked before."""
    return EMITTERS[op] if op in EMITTERS else _plugged()[op]


def missing_ops(module: Module) -> list[str]:
    """Ops of the module that have no CPU kernel; collectives need none."""
    names = {op.name for _, op in module.ops() if not op.name.startswith("comm.")}
    return sorted(names - {*EMITTERS, *_plugged()})


def extra_sizes(ops: Iterable[Op], symbols: Mapping[str, int]) -> dict[Op, list[int]]:
    """Elements of the buffers that an op's kernels pass between them, for the memory plan."""
    out: dict[Op, list[int]] = {}
    for op in ops:
        if op.name == "moe.route":
            out[op] = [symbols["T"] * matrix(op.operands[1].type)[0]]
        elif op.name == "moe.dispatch":
            (ids,) = [o for o in op.operands[1:2] if isinstance(o.type, TensorType)]
            assert isinstance(ids.type, TensorType)
            tokens, top_k = ids.type.bound(symbols)
            out[op] = [tokens * top_k]
        elif op.name == "moe.experts":
            rows = op.operands[0].type
            assert isinstance(rows, TensorType)
            wide, inter = matrix(op.operands[2].type)[0], matrix(op.operands[3].type)[1]
            n = rows.bound(symbols)[0]
            out[op] = [n * wide, n * inter]
    return out


# Emitters of further ops register themselves on import.
from moec.codegen.tvm import emit_heads  # noqa: E402
