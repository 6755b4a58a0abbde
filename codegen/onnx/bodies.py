"""Every op of the IR as a body of standard ONNX ops.

A body takes the names of the op's operands and returns those of its results; an op that writes a cache returns the new
cache. Floats are FP32, integers of the IR i32; layers are i64 scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnx import TensorProto, helper

from moec.codegen.onnx import quantised, sparse
from moec.codegen.onnx.cached import cached, slots
from moec.codegen.onnx.graph import Graph
from moec.ir import CacheType, Op, TensorType

Body = Callable[[Graph, Op, list[str]], list[str]]
LOWEST = -1e30
"""Stands for a score that is not seen: its exponential is 0."""


def _shape(op: Op, position: int) -> tuple[Any, ...]:
    t = op.operands[position].type
    assert isinstance(t, TensorType)
    return t.shape


def _embed(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("Gather", x[1], x[0], axis=0)]


def _rms(g: Graph, x: str, w: str, eps: Any) -> str:
    square = g("ReduceMean", g("Mul", x, x), g.const([-1]), keepdims=1)
    root = g("Sqrt", g("Add", square, g.f32(eps)))
    return str(g("Mul", g("Div", x, root), w))


def _norm_rms(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [_rms(g, x[0], x[1], op.attrs["eps"])]


def _norm_add(g: Graph, op: Op, x: list[str]) -> list[str]:
    total = g("Add", x[0], x[1])
    return [total, _rms(g, total, x[2], op.attrs["eps"])]


def _norm_layer(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("LayerNormalization", *x, axis=-1, epsilon=op.attrs["eps"])]


def _linear(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("Gemm", *x, transB=1)]


def _linear_heads(g: Graph, op: Op, x: list[str]) -> list[str]:
    y = g("MatMul", g("Transpose", x[0], perm=[1, 0, 2]), g("Transpose", x[1], perm=[0, 2, 1]))
    return [g("Transpose", y, perm=[1, 0, 2])]


def _glu(g: Graph, x: str, width: int, a: Any) -> str:
    gate, up = g.split(x, (width // 2, width // 2))
    if "limit" in a:
        gate = g("Min", gate, g.f32(a["limit"]))
        up = g("Clip", up, g.f32(-a["limit"]), g.f32(a["limit"]))
    up = g("Add", up, g.f32(a["shift"])) if "shift" in a else up
    if a.get("act") == "relu":
        return str(g("Mul", g("Relu", gate), up))
    if "act" in a:
        form = "tanh" if a["act"] == "gelu_tanh" else "none"
        return str(g("Mul", g("Gelu", gate, approximate=form), up))
    inner = g("Mul", gate, g.f32(a["alpha"])) if "alpha" in a else gate
    return str(g("Mul", g("Mul", gate, g("Sigmoid", inner)), up))


def _swiglu(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [_glu(g, x[0], int(_shape(op, 0)[-1]), op.attrs)]


def _scale(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("Mul", x[0], g.f32(float(op.attrs["factor"])))]  # type: ignore[arg-type]


def _clamp(g: Graph, op: Op, x: list[str]) -> list[str]:
    limit = float(op.attrs["limit"])  # type: ignore[arg-type]
    return [g("Clip", x[0], g.f32(-limit), g.f32(limit))]


def _gate_rows(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("Mul", x[0], g("Sigmoid", x[1]))]


def _split(g: Graph, op: Op, x: list[str]) -> list[str]:
    return g.split(x[0], op.attrs["sizes"])  # type: ignore[arg-type]


def _unflatten(g: Graph, op: Op, x: list[str]) -> list[str]:
    kept = len(_shape(op, 0)) - 1
    return [g.reshape(x[0], *[0] * kept, *op.attrs["sizes"])]  # type: ignore[misc]


def _flatten(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g.reshape(x[0], 0, -1)]


def _rows_gather(g: Graph, op: Op, x: list[str]) -> list[str]:
    return [g("Gather", x[0], x[1], axis=0)]


def _rope(g: Graph, op: Op, x: list[str]) -> list[str]:
    offset, dims, width = int(op.attrs["offset"]), int(op.attrs["dims"]), int(_shape(op, 0)[-1])  # type: ignore[arg-type]
    rank = len(_shape(op, 0))
    cos, sin = g.split(g("Gather", x[2], x[1], axis=0), (dims // 2, dims // 2))
    if rank == 3:
        cos, sin = g.unsqueeze(cos, 1), g.unsqueeze(sin, 1)
    sizes = [s for s in (offset, dims, width - offset - dims) if s]
    parts = g.split(x[0], sizes)
    at = 1 if offset else 0
    if op.attrs["interleaved"]:
        pairs = g.reshape(parts[at], *[0] * (rank - 1), dims // 2, 2)
        u, v = (g("Squeeze", p, g.const([-1])) for p in g.split(pairs, (1, 1)))
    else:
        u, v = g.split(parts[at], (dims // 2, dims // 2))
    a = g("Sub", g("Mul", u, cos), g("Mul", v, sin))
    b = g("Add", g("Mul", v, cos), g("Mul", u, sin))
    if op.attrs["interleaved"]:
        both = g.concat([g.unsqueeze(a, -1), g.unsqueeze(b, -1)], -1)
        parts[at] = g.reshape(both, *[0] * (rank - 1), dims)
    else:
        parts[at] = g.concat([a, b], -1)
    return [parts[0] if len(parts) == 1 else g.concat(parts, -1)]


def _index(g: Graph, op: Op, x: list[str]) -> list[str]:
    scale, offset = int(op.attrs["scale"]), int(op.attrs["offset"])  # type: ignore[arg-type]
    return [g("Add", g("Mul", x[0], g.const(scale)), g.const(offset))]


def _append(g: Graph, op: Op, x: list[str]) -> list[str]:
    kv, layer, first, second, seq, pos, pages = x
    if len(_shape(op, 2)) == 3:
        first, second = g.reshape(first, 0, -1), g.reshape(second, 0, -1)
    index = slots(g, kv, layer, pages, g.cast(seq, "int64"), g.cast(pos, "int64"))
    rows = g.concat([first, second], -1)
    cache = op.operands[0].type
    if isinstance(cache, CacheType) and cache.dtype == "bf16":
        rows = g.cast(g("Cast", rows, to=TensorProto.BFLOAT16), "float32")
    if isinstance(cache, CacheType) and cache.kind == "kv.indexed":
        written = sum(int(_shape(op, i)[-1]) for i in (2, 3))
        behind = g("Slice", g("GatherND", kv, index), g.const([written]), g.const([1 << 40]), g.const([-1]))
        rows = g.concat([rows, behind], -1)
    return [g("ScatterND", kv, index, rows)]


def _read(g: Graph, op: Op, x: list[str]) -> list[str]:
    kv, layer, pages, starts = x
    rank = int(op.attrs["rank"])  # type: ignore[arg-type]
    begins = g.cast(starts, "int64")
    total = g.scalar(g("Slice", begins, g.const([-1]), g.const([1 << 40])))
    r = g("Range", g.const(0), total, g.const(1))
    behind = g("GreaterOrEqual", g.unsqueeze(r, 1), g("Slice", begins, g.const([1]), g.const([1 << 40])))
    seq = g("ReduceSum", g.cast(behind, "int64"), g.const([1]), keepdims=0)
    pos = g("Sub", r, g("Gather", begins, seq, axis=0))
    rows = g("GatherND", kv, slots(g, kv, layer, pages, seq, pos))
    width = int(op.results[0].type.shape[1]) + int(op.results[1].type.shape[1])  # type: ignore[union-attr, arg-type]
    rows = g("Slice", rows, g.const([0]), g.const([width]), g.const([-1]))
    return g.split(rows, (rank, width - rank))


def _attend(g: Graph, scores: str, mask: str, values: str, sinks: str | None = None) -> str:
    """Softmax over the keys that the mask shows, times values: scores [g, n, s], mask [n, s], values [g, s, v]."""
    scores = g("Where", mask, scores, g.f32(LOWEST))
    if sinks is None:
        return str(g("MatMul", g("Softmax", scores, axis=-1), values))
    weights = g("Softmax", g.concat([scores, sinks], -1), axis=-1)
    keys = g("Slice", weights, g.const([0]), g.const([-1]), g.const([-1]))
    return str(g("MatMul", keys, values))


def _mask(g: Graph, op: Op, seq: str, pos: str, of: str, at: str) -> str:
    """bool[T, s]: the cached positions that each token sees."""
    here = g.unsqueeze(g.cast(pos, "int64"), 1)
    seen = g("Equal", g.unsqueeze(g.cast(seq, "int64"), 1), of)
    seen = g("And", seen, g("LessOrEqual", at, here))
    if "window" in op.attrs:
        seen = g("And", seen, g("Greater", at, g("Sub", here, g.const(int(op.attrs["window"])))))  # type: ignore[arg-type]
    if "chunk" in op.attrs:
        size = g.const(int(op.attrs["chunk"]))  # type: ignore[arg-type]
        seen = g("And", seen, g("GreaterOrEqual", at, g("Mul", g("Div", here, size), size)))
    return str(seen)


def _attn_heads(g: Graph, op: Op, x: list[str]) -> list[str]:
    q, kv, layer, seq, pos, pages = x[:6]
    _, heads, dim = _shape(op, 0)
    groups, v = int(op.attrs["kv_heads"]), int(op.attrs["v"])  # type: ignore[arg-type]
    share = int(heads) // groups
    rows, of, at = cached(g, kv, layer, pages)
    k, values = g.split(rows, (groups * int(dim), groups * v))
    k = g("Transpose", g.reshape(k, 0, groups, int(dim)), perm=[1, 2, 0])
    values = g("Transpose", g.reshape(values, 0, groups, v), perm=[1, 0, 2])
    # Heads of a group lie behind one another: [groups, share * T, dim].
    mine = g("Transpose", g.reshape(q, 0, groups, share, int(dim)), perm=[1, 2, 0, 3])
    scores = g("Mul", g("MatMul", g.reshape(mine, groups, -1, int(dim)), k), g.f32(float(op.attrs["scale"])))  # type: ignore[arg-type]
    if "softcap" in op.attrs:
        cap = g.f32(float(op.attrs["softcap"]))  # type: ignore[arg-type]
        scores = g("Mul", g("Tanh", g("Div", scores, cap)), cap)
    mask = g("Tile", _mask(g, op, seq, pos, of, at), g.const([share, 1]))
    sinks = None
    if len(x) == 7:
        tokens = g.dim(q, 0)
        column = g("Expand", g.reshape(x[6], groups, share, 1), g.concat([g.const([groups, share]), tokens], 0))
        sinks = g.reshape(column, groups, -1, 1)
    y = g.reshape(_attend(g, scores, mask, values, sinks), groups, share, -1, v)
    return [g.reshape(g("Transpose", y, perm=[2, 0, 1, 3]), 0, int(heads), v)]


def _attn_absorbed(g: Graph, op: Op, x: list[str]) -> list[str]:
    q, q_rope, kv, layer, seq, pos, pages, *chosen = x
    rank = int(_shape(op, 0)[2])
    width = rank + int(_shape(op, 1)[2])
    rows, of, at = cached(g, kv, layer, pages)
    keys, latent = (g("Slice", rows, g.const([0]), g.const([n]), g.const([-1])) for n in (width, rank))
    both = g("Transpose", g.concat([q, q_rope], -1), perm=[1, 0, 2])
    scores = g("Mul", g("MatMul", both, g("Transpose", keys, perm=[1, 0])), g.f32(float(op.attrs["scale"])))  # type: ignore[arg-type]
    mask = _mask(g, op, seq, pos, of, at)
    if chosen:
        mask = sparse.only_chosen(g, mask, chosen[0], at)
    return [g("Transpose", _attend(g, scores, mask, latent), perm=[1, 0, 2])]


def _attn_mla(g: Graph, op: Op, x: list[str]) -> list[str]:
    q, kv, key_rope, seq, pos, starts, *chosen = x
    heads, nope, v = int(_shape(op, 0)[1]), int(op.attrs["nope"]), int(op.attrs["v"])  # type: ignore[arg-type]
    rope = int(_shape(op, 0)[2]) - nope
    own = g("Transpose", g.reshape(kv, 0, heads, nope + v), perm=[1, 0, 2])
    k, values = g.split(own, (nope, v))
    q_nope, q_rope = g.split(g("Transpose", q, perm=[1, 0, 2]), (nope, rope))
    scores = g("MatMul", q_nope, g("Transpose", k, perm=[0, 2, 1]))
    scores = g("Add", scores, g("MatMul", q_rope, g("Transpose", key_rope, perm=[1, 0])))
    scores = g("Mul", scores, g.f32(float(op.attrs["scale"])))  # type: ignore[arg-type]
    begin = g.unsqueeze(g("Gather", g.cast(starts, "int64"), seq, axis=0), 1)
    rows = g("Range", g.const(0), g.scalar(g.dim(kv, 0)), g.const(1))
    last = g("Add", begin, g.unsqueeze(g.cast(pos, "int64"), 1))
    mask = g("And", g("GreaterOrEqual", rows, begin), g("LessOrEqual", rows, last))
    if chosen:
        mask = sparse.only_chosen(g, mask, chosen[0], g.unsqueeze(g("Sub", rows, begin), 1))
    return [g("Transpose", _attend(g, scores, mask, values), perm=[1, 0, 2])]


def _route(g: Graph, op: Op, x: list[str]) -> list[str]:
    a = op.attrs
    experts, k = int(_shape(op, 1)[0]), int(a["top_k"])  # type: ignore[arg-type]
    to_logits = a.get("bias_to") == "logits"
    logits = g("Gemm", x[0], x[1], *(x[2:] if to_logits else []), transB=1)
    if a["score"] == "sparsemixer":
        ids, weights = _sparsemixer(g, logits, k, float(a["jitter"]))  # type: ignore[arg-type]
    else:
        scores = g("Sigmoid", logits) if a["score"] == "sigmoid" else g("Softmax", logits, axis=-1)
        choice = g("Add", scores, x[2]) if len(x) == 3 and not to_logits else scores
        choice = _limit_groups(g, op, choice, experts)
        _, ids = g("TopK", choice, g.const([k]), outputs=2, axis=-1, largest=1, sorted=1)
        weights = g("GatherElements", scores, ids, axis=-1)
    if a["normalise"]:
        total = g("Add", g("ReduceSum", weights, g.const([-1]), keepdims=1), g.f32(1e-20))
        weights = g("Div", weights, total)
    return [g.cast(ids, "int32"), g("Mul", weights, g.f32(float(a["scale"])))]  # type: ignore[arg-type]


def _limit_groups(g: Graph, op: Op, choice: str, experts: int) -> str:
    groups, chosen = int(op.attrs["groups"]), int(op.attrs["top_groups"])  # type: ignore[arg-type]
    if chosen == groups:
        return choice
    by_group = g.reshape(choice, 0, groups, experts // groups)
    if op.attrs["group_score"] == "top2":
        best, _ = g("TopK", by_group, g.const([min(2, experts // groups)]), outputs=2, axis=-1, largest=1, sorted=1)
        rank = g("ReduceSum", best, g.const([-1]), keepdims=0)
    else:
        rank = g("ReduceMax", by_group, g.const([-1]), keepdims=0)
    _, index = g("TopK", rank, g.const([chosen]), outputs=2, axis=-1, largest=1, sorted=1)
    ones = g("Expand", g.f32(1.0), g("Shape", index))
    open_ = g("ScatterElements", g("Mul", rank, g.f32(0.0)), index, ones, axis=-1)
    mask = g.unsqueeze(g("Greater", open_, g.f32(0.5)), -1)
    return g.reshape(g("Where", mask, by_group, g.f32(LOWEST)), 0, experts)


def _sparsemixer(g: Graph, logits: str, top_k: int, jitter: float) -> tuple[str, str]:
    left, ids, weights = logits, [], []
    for _ in range(top_k):
        best, chosen = g("TopK", left, g.const([1]), outputs=2, axis=-1, largest=1, sorted=1)
        size = g("Max", g("Abs", logits), best)
        near = g("LessOrEqual", g("Div", g("Sub", best, logits), size), g.f32(2 * jitter))
        inside = g("Softmax", g("Where", near, left, g.f32(LOWEST)), axis=-1)
        weights.append(g("GatherElements", inside, chosen, axis=-1))
        ids.append(chosen)
        lowest = g("Expand", g.f32(LOWEST), g("Shape", chosen))
        left = g("ScatterElements", left, chosen, lowest, axis=-1)
    return g.concat(ids, -1), g.concat(weights, -1)


def _dispatch(g: Graph, op: Op, x: list[str]) -> list[str]:
    experts, k = int(op.attrs["experts"]), int(_shape(op, 1)[1])  # type: ignore[arg-type]
    flat = g.cast(g.reshape(x[1], -1), "int64")
    count = g("Shape", flat)
    r = g("Range", g.const(0), g.scalar(count), g.const(1))
    # A stable sort by expert: keys that differ.
    key = g("Add", g("Mul", flat, g.scalar(count)), r)
    _, by_expert = g("TopK", key, count, outputs=2, axis=-1, largest=0, sorted=1)
    hit = g("Equal", g.unsqueeze(flat, 1), g.const(list(range(experts))))
    counts = g("ReduceSum", g.cast(hit, "int64"), g.const([0]), keepdims=0)
    offsets = g.concat([g.const([0]), g("CumSum", counts, g.const(0))], 0)
    order = g("ScatterElements", r, by_expert, r, axis=0)
    rows = g("Gather", x[0], g("Div", by_expert, g.const(k)), axis=0)
    return [rows, g.cast(offsets, "int32"), g.cast(g.reshape(order, -1, k), "int32")]


def _experts(g: Graph, op: Op, x: list[str]) -> list[str]:
    """A loop over the experts: each takes its rows, and results are joined, which are sorted by expert already."""
    rows, offsets, up, down, *biases = x
    experts, hidden, inter = (int(d) for d in _shape(op, 3))
    b = Graph("e")
    e, out = "expert", "done"
    here = b.cast(b("Gather", offsets, e, axis=0), "int64")
    end = b.cast(b("Gather", offsets, b("Add", e, b.const(1)), axis=0), "int64")
    mine = b("Slice", rows, b.reshape(here, 1), b.reshape(end, 1), b.const([0]))
    wide = b("MatMul", mine, b("Transpose", b("Gather", up, e, axis=0), perm=[1, 0]))
    if biases:
        wide = b("Add", wide, b("Gather", biases[0], e, axis=0))
    narrow = b("MatMul", _glu(b, wide, 2 * inter, op.attrs), b("Transpose", b("Gather", down, e, axis=0), perm=[1, 0]))
    if biases:
        narrow = b("Add", narrow, b("Gather", biases[1], e, axis=0))
    b.nodes.append(helper.make_node("Identity", ["more"], ["go_on"]))
    b.nodes.append(helper.make_node("Concat", [out, narrow], ["joined"], axis=0))
    body = helper.make_graph(
        b.nodes,
        "experts",
        [
            helper.make_tensor_value_info(e, TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info(out, TensorProto.FLOAT, [None, hidden]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("joined", TensorProto.FLOAT, [None, hidden]),
        ],
    )
    nothing = g("ConstantOfShape", g.const([0, hidden]))
    return [g("Loop", g.const(experts), g.const(True, "bool"), nothing, body=body)]


def _weigh(g: Graph, op: Op, x: list[str]) -> list[str]:
    rows, order, weights = x
    flat = g.cast(g.reshape(order, -1), "int64")
    factor = g("ScatterElements", g.reshape(weights, -1), flat, g.reshape(weights, -1), axis=0)
    return [g("Mul", rows, g.unsqueeze(factor, 1))]


def _combine(g: Graph, op: Op, x: list[str]) -> list[str]:
    rows = g("Gather", x[0], x[1], axis=0)
    if len(x) == 3:
        rows = g("Mul", rows, g.unsqueeze(x[2], -1))
    return [g("ReduceSum", rows, g.const([1]), keepdims=0)]


BODIES: dict[str, Body] = {
    "embed": _embed, "norm.rms": _norm_rms, "norm.add_rms": _norm_add, "norm.layer": _norm_layer, "linear": _linear,
    "linear.heads": _linear_heads, "swiglu": _swiglu, "scale": _scale, "clamp": _clamp, "gate.rows": _gate_rows,
    "split": _split, "unflatten": _unflatten, "flatten": _flatten, "rows.gather": _rows_gather, "rope": _rope,
    "index.affine": _index, "cache.append": _append, "cache.append_heads": _append, "cache.read": _read,
    "attn.heads": _attn_heads, "attn.mla": _attn_mla, "attn.mla_absorbed": _attn_absorbed, "moe.route": _route,
    "moe.dispatch": _dispatch, "moe.experts": _experts, "moe.weigh": _weigh, "moe.combine": _combine,
    "cache.append_index": sparse.append_index, "attn.index": sparse.choose, "quant.cast": quantised.cast,
    "add": lambda g, op, x: [g("Add", x[0], x[1])],
}  # fmt: skip


def missing(ops: Sequence[Op]) -> list[str]:
    """Ops that have no body."""
    return sorted({op.name for op in ops} - set(BODIES) - {"repeat"})
