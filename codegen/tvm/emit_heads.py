"""Emitters of the ops that further families add: keys and values per head, sparse attention; see `emit`."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import elementwise, heads, indexer, norm_heads, rowwise
from moec.codegen.tvm import sparsemixer as mixer
from moec.codegen.tvm.cache import CacheAppendSpec, CacheLayout, build_cache_append
from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter, integer, number
from moec.codegen.tvm.tir import const
from moec.codegen.tvm.vector import KernelSpecError
from moec.ir import Op, TensorType, Value
from moec.ir.module import Operand


def norm(e: FunctionEmitter, op: Op) -> None:
    """A layer norm, or an RMS norm of each head."""
    x, w, *b = op.operands
    px, py = e.place(x), e.place(op.result)
    count, hx, hy = (py.shape[1], px.strides[1], py.strides[1]) if len(py.shape) == 3 else (1, 0, 0)
    spec = norm_heads.NormHeadsSpec(count, py.shape[-1], number(op, "eps"), bool(b), py.shape[0], px.ld, hx, py.ld, hy)
    weights = [*e.weight(w), *(p for o in b for p in e.weight(o))]
    e.run(norm_heads.build_norm_heads, spec, e.at(x), *weights, e.at(op.result), e.count(op.result))


def sparsemixer(e: FunctionEmitter, op: Op, logits: Any, experts: int) -> None:
    """The choice of a `moe.route` by sparsemixer, from its logits."""
    ids, weights = op.results
    scale = number(op, "scale")
    spec = mixer.SparsemixerSpec(
        experts, integer(op, "top_k"), number(op, "jitter"), bool(op.attrs["normalise"]), scale
    )
    e.run(mixer.build_sparsemixer, spec, logits, e.at(ids), e.at(weights), e.count(ids))


def group_bias(e: FunctionEmitter, rows: Any, offsets: Operand, bias: Operand, ld: int) -> None:
    """Add the bias of each expert to its rows."""
    assert isinstance(bias.type, TensorType)
    count, width = (int(d) for d in bias.type.shape)  # type: ignore[arg-type]
    e.run(rowwise.build_group_bias, rowwise.GroupBiasSpec(count, width, ld), rows, e.at(offsets), *e.weight(bias))


def _scale(e: FunctionEmitter, op: Op) -> None:
    x, y = op.operands[0], e.place(op.result)
    spec = elementwise.ScaleSpec(y.shape[1], number(op, "factor"), y.shape[0], e.place(x).ld, y.ld)
    e.run(elementwise.build_scale, spec, e.at(x), e.at(op.result), e.count(op.result))


def _clamp(e: FunctionEmitter, op: Op) -> None:
    x, y = op.operands[0], e.place(op.result)
    spec = rowwise.ClampSpec(y.shape[1], number(op, "limit"), y.shape[0], e.place(x).ld, y.ld)
    e.run(rowwise.build_clamp, spec, e.at(x), e.at(op.result), e.count(op.result))


def _gate_rows(e: FunctionEmitter, op: Op) -> None:
    x, g = op.operands
    y = e.place(op.result)
    spec = rowwise.GateRowsSpec(y.shape[1], y.shape[0], e.place(x).ld, e.place(g).ld, y.ld)
    e.run(rowwise.build_gate_rows, spec, e.at(x), e.at(g), e.at(op.result), e.count(op.result))


def _weigh(e: FunctionEmitter, op: Op) -> None:
    rows, order, weights = op.operands
    assert isinstance(rows, Value)
    source, y, top_k = e.place(rows), e.place(op.result), e.place(order).shape[1]
    token = T.address_of(e.p.workspace[e.base + source.keeps[-1].offset])
    spec = rowwise.WeighRowsSpec(y.shape[1], top_k, e.most(order), source.ld, y.ld)
    args = (e.at(rows), token, e.at(order), e.at(weights), e.at(op.result))
    e.run(rowwise.build_weigh_rows, spec, *args, e.count(order))


def _index(e: FunctionEmitter, op: Op) -> None:
    (l,) = op.operands
    assert isinstance(l, Value)
    e.env[op.result] = e.env[l] * const(integer(op, "scale")) + const(integer(op, "offset"))


def _append(e: FunctionEmitter, op: Op) -> None:
    kv, layer, k, v, seq, pos, pages = op.operands
    for part in (k, v):
        p = e.place(part)
        assert p.strides[1:] == (p.shape[2], 1), "heads of keys and values lie side by side"
    spec = CacheAppendSpec(e.cache_layout(kv), e.most(k), e.place(k).ld, e.place(v).ld)
    args = (e.at(k), e.at(v), e.at(seq), e.at(pos), e.at(pages), e.cache(kv, layer))
    e.run(build_cache_append, spec, *args, e.count(k))


def _attention(e: FunctionEmitter, op: Op) -> None:
    if "softcap" in op.attrs:
        raise KernelSpecError(kernel="attn_heads", problem="scores with a softcap have no CPU kernel")
    q, kv, layer, seq, pos, pages, *sinks = op.operands
    pq, out = e.place(q), e.place(op.result)
    window, chunk = (integer(op, key) if key in op.attrs else 0 for key in ("window", "chunk"))
    # A call for one sequence feeds consecutive positions: its tokens share key tiles.
    spec = heads.HeadsSpec(
        heads=pq.shape[1], groups=integer(op, "kv_heads"), cache=e.cache_layout(kv), scale=number(op, "scale"),
        max_tokens=pq.shape[0], window=window, chunk=chunk, sinks=bool(sinks), one_sequence=e.p.limits["B"] == 1,
        ld_q=pq.ld, head_q=pq.strides[1], ld_out=out.ld, head_out=out.strides[1],
    )  # fmt: skip
    scratch = e.scratch(heads.scratch_elements(spec, e.p.machine))
    given = [pointer for s in sinks for pointer in e.weight(s)]
    args = (e.at(q), e.cache(kv, layer), e.at(pages), e.at(seq), e.at(pos), *given, e.at(op.result), scratch)
    e.run(heads.build_attn_heads, spec, *args, e.count(q))


def _append_index(e: FunctionEmitter, op: Op) -> None:
    kv, layer, key, seq, pos, pages = op.operands
    p = e.place(key)
    spec = indexer.AppendIndexSpec(unscaled(e, kv), p.shape[1], p.shape[0], p.ld)
    args = (e.at(key), e.at(seq), e.at(pos), e.at(pages), e.cache(kv, layer))
    e.run(indexer.build_append_index, spec, *args, e.count(key))


def _choose_positions(e: FunctionEmitter, op: Op) -> None:
    q, weights, kv, layer, seq, pos, pages = op.operands
    pq, context = e.place(q), e.p.limits["N"] * e.p.page_size
    spec = indexer.IndexSpec(
        unscaled(e, kv), pq.shape[1], pq.shape[2], integer(op, "top_k"), number(op, "scale"), pq.shape[0], context,
        pq.ld, pq.strides[1], e.place(weights).ld,
    )  # fmt: skip
    all_scores = pq.shape[0] * context
    scores = e.scratch(all_scores)
    work = e.scratch(indexer.scratch_elements(spec, e.p.machine), behind=-(-all_scores // 16) * 16)
    args = (e.at(q), e.at(weights), e.cache(kv, layer), e.at(pages), e.at(seq), e.at(pos), scores, work)
    e.run(indexer.build_index_scores, spec, *args, e.count(q))
    e.run(indexer.build_index_select, spec, scores, e.at(pos), e.at(op.result), e.count(q))


def unscaled(e: FunctionEmitter, kv: Operand) -> CacheLayout:
    """The layout of a cache with index keys beside each position."""
    layout = e.cache_layout(kv)
    if layout.dtype == "fp8":
        raise KernelSpecError(kernel="mla_sparse", problem="a cache with index keys in fp8, can read bf16 and f32")
    return layout


EMITTERS.update(
    {
        "norm.layer": norm,
        "scale": _scale,
        "clamp": _clamp,
        "gate.rows": _gate_rows,
        "moe.weigh": _weigh,
        "index.affine": _index,
        "cache.append_heads": _append,
        "attn.heads": _attention,
        "cache.append_index": _append_index,
        "attn.index": _choose_positions,
    }
)
