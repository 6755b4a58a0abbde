"""Emitters of the ops around routed experts: router, dispatch, experts, combination; see `emit`."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import elementwise, emit_heads, grouped, moe, quantise, router
from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter, format_of, glu, integer, matrix, number
from moec.codegen.tvm.emit_rows import linear_call, quantise_spec
from moec.ir import Op, TensorType, Value


def _route(e: FunctionEmitter, op: Op) -> None:
    x, gate = op.operands[:2]
    ids, weights = op.results
    experts, _ = matrix(gate.type)
    logits = e.temporary(0)
    a = op.attrs
    bias = e.weight(op.operands[2]) if len(op.operands) == 3 else []
    inside, bias = (bias, []) if a.get("bias_to") == "logits" else ([], bias)
    linear_call(e, e.at(x), e.place(x).ld, gate, inside, logits, experts, e.most(x), e.count(x))
    if a["score"] == "sparsemixer":
        emit_heads.sparsemixer(e, op, logits, experts)
        _keep_choices(e, op)
        return
    spec = router.RouterSpec(
        experts=experts, top_k=integer(op, "top_k"), score=str(a["score"]), has_bias=bool(bias),
        groups=integer(op, "groups"), top_groups=integer(op, "top_groups"),
        group_score="top2sum" if a["group_score"] == "top2" else "max",
        normalise=bool(a["normalise"]), scale=number(op, "scale"), max_tokens=e.most(x), ld=experts,
    )  # fmt: skip
    scratch = e.scratch(router.scratch_elements(spec, e.p.machine))
    e.run(router.build_moe_route, spec, logits, *bias, e.at(ids), e.at(weights), scratch, e.count(x))
    _keep_choices(e, op)


def _keep_choices(e: FunctionEmitter, op: Op) -> None:
    if e.record is not None:
        e.record.keep(op, *e.buffer_of(op.results[0]), e.count(op.results[0]))


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
        rounding = quantise_spec(rows.type, inter, y.shape[0], inter, inter)
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


EMITTERS.update(
    {
        "moe.route": _route,
        "moe.dispatch": _dispatch,
        "moe.experts": _experts,
        "moe.combine": _combine,
    }
)
