"""Emitters of latent attention and its cache; see `emit`."""

from __future__ import annotations

from moec.codegen.tvm import emit_heads, mla_decode, mla_prefill
from moec.codegen.tvm.cache import CacheAppendSpec, CacheGatherSpec, build_cache_append, build_cache_gather
from moec.codegen.tvm.emit import EMITTERS, FunctionEmitter, integer, number
from moec.codegen.tvm.tir import const
from moec.ir import Op


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
    q, q_rope, kv, layer, seq, pos, pages, *chosen = op.operands
    pq, pr, out = e.place(q), e.place(q_rope), e.place(op.result)
    layout = emit_heads.unscaled(e, kv) if chosen else e.cache_layout(kv)
    spec = mla_decode.MlaDecodeSpec(
        pq.shape[1], layout, number(op, "scale"), pq.shape[0], pq.ld, pq.strides[1], pr.ld, pr.strides[1], out.ld,
        out.strides[1], e.place(chosen[0]).shape[1] if chosen else 0,
    )  # fmt: skip
    scratch = e.scratch(mla_decode.scratch_elements(spec, e.p.machine))
    e.run(
        mla_decode.build_mla_decode, spec, e.at(q), e.at(q_rope), e.cache(kv, layer), e.at(pages), e.at(seq), e.at(pos),
        *(e.at(c) for c in chosen), e.at(op.result), scratch, e.count(q),
    )  # fmt: skip


EMITTERS.update(
    {
        "cache.append": _cache_append,
        "cache.read": _cache_read,
        "attn.mla": _mla,
        "attn.mla_absorbed": _mla_absorbed,
    }
)
