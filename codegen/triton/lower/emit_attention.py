"""Launches of attention: over latents, plain and absorbed, and over heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import SCALES, cache_of, pointer, tensor_of, width
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.lower.launching import typed
from moec.codegen.triton.lower.places import Base, Place, cache_part
from moec.codegen.triton.spec import KernelSpec, kernel
from moec.codegen.triton.specs.recipe import power_of_two
from moec.ir import Op, Value, WeightRef
from moec.ir.expr import evaluate

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering

MOST_SPLITS = 16


def cache_parts(low: Lowering, op: Op, cache: Value, rank: int, rotary: int) -> tuple[dict[str, Place], dict[str, int]]:
    """The cache's latent and rotary part, and the sizes that its kernels hold as constants."""
    t = cache_of(cache)
    whole = low.cache(cache, op.operands[3 if op.name == "attn.mla_absorbed" else 1])  # type: ignore[arg-type]
    index = int(t.shape[3]) - rank - rotary  # type: ignore[arg-type]
    dims = {"DV": rank, "DR": rotary, "PAGE": int(t.shape[2]), "INDEX": index}  # type: ignore[arg-type]
    if t.quant is None:
        if t.dtype not in ("bf16", "f32"):
            raise NoKernel(op=op.name, reason=f"the cache is {t}")
        return {"latent_ptr": whole, "rope_ptr": whole.part(rank)}, dims
    if t.dtype != "fp8_e4m3" or t.quant.block[-1] != 128 or t.exact != dims["DR"]:
        raise NoKernel(op=op.name, reason=f"the cache is {t}; E4M3 with scales of 128 has a kernel")
    scales, exact = (cache_part(whole, t, what) for what in ("cache_scale", "cache_exact"))
    return {"latent_ptr": whole, "rope_ptr": exact, "scale_ptr": scales}, dims


def of_cache(name: str, cache: Value) -> KernelSpec:
    """The kernel for a cache as it stands, or for one in FP8 with scales."""
    return kernel(f"{name}_fp8" if cache_of(cache).quant is not None else name)


def cache_types(cache: Value) -> dict[str, str]:
    """Element types of a cache's parts."""
    t = cache_of(cache)
    if t.quant is None:
        return dict.fromkeys(("latent_ptr", "rope_ptr"), pointer(t.dtype))
    return {"latent_ptr": pointer(t.dtype), "rope_ptr": "*bf16", "scale_ptr": "*" + SCALES[t.quant.scale]}


def cache_read(low: Lowering, group: Group) -> None:
    """All cached positions of every sequence in one piece."""
    op = group.anchor
    cache, _, pages, starts = op.operands
    assert isinstance(cache, Value) and isinstance(pages, Value)
    latent, rope = op.results
    parts, dims = cache_parts(low, op, cache, int(op.attrs["rank"]), width(rope))  # type: ignore[arg-type]
    instance = low.phase.table.instance(of_cache("cache_read", cache), "any", **dims)
    instance = typed(instance, cache_types(cache), latent_out_ptr=latent, rope_out_ptr=rope)
    k = part(op)
    low.launch(instance, group, {
        **parts, "pages_ptr": low.place(pages), "start_ptr": low.place(starts), "latent_out_ptr": low.place(latent),
        "rope_out_ptr": low.place(rope), "max_pages": str(tensor_of(pages).shape[1]),
    }, {"CONTEXT": "C", "B": f"B{k}"})  # fmt: skip


def attention(low: Lowering, group: Group) -> None:
    """Plain attention over expanded keys and values."""
    op = group.anchor
    q, kv, rope, _, _, starts, *chosen = op.operands
    assert isinstance(q, Value)
    if chosen:
        raise NoKernel(op=op.name, reason="chosen positions have one in the absorbed form: --pass mla-absorb{prefill="
                       "absorbed,decode=absorbed}")  # fmt: skip
    heads, columns = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    nope, v = int(op.attrs["nope"]), int(op.attrs["v"])  # type: ignore[arg-type]
    dims = {"HEADS": heads, "DN": nope, "DV": v, "DR": columns - nope}
    powers(op, dims)
    instance = low.phase.table.instance(kernel("mla_prefill"), "any", **dims)
    instance = typed(instance, q_ptr=q, kv_ptr=kv, rope_ptr=rope, out_ptr=op.result)
    k = part(op)
    low.launch(instance, group, {
        "q_ptr": low.place(q), "kv_ptr": low.place(kv), "rope_ptr": low.place(rope),
        "q_start_ptr": given_place(op, "q_starts"), "k_start_ptr": low.place(starts),
        "out_ptr": low.place(op.result), "q_row": low.place(q).row, "softmax_scale": op.attrs["scale"],
    }, {"CONTEXT": f"ceildiv(T{k}, B{k})", "B": f"B{k}"})  # fmt: skip


def absorbed(low: Lowering, group: Group) -> None:
    """Absorbed attention over the paged cache: shares of the keys in parallel, then their sum."""
    op = group.anchor
    q, rope, cache, _, seq, pos, pages, *chosen = op.operands
    assert isinstance(q, Value) and isinstance(rope, Value) and isinstance(cache, Value) and isinstance(pages, Value)
    heads, rank = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    parts, dims = cache_parts(low, op, cache, rank, int(tensor_of(rope).shape[-1]))  # type: ignore[arg-type]
    dims["HEADS"] = heads
    powers(op, {"DV": rank, "DR": dims["DR"]})
    at, rope_at = low.place(q), low.place(rope)
    k = part(op)
    spec, sequences, queries = of_cache("mla_decode_split", cache), f"B{k}", f"ceildiv(T{k}, B{k})"
    seen: dict[str, Any] = {"length_ptr": given_place(op, "lengths")}
    if chosen:
        if cache_of(cache).quant is not None:
            raise NoKernel(op=op.name, reason=f"positions are chosen and the cache is {cache_of(cache)}")
        # Every token has keys of its own: it is a sequence with one query.
        spec, sequences, queries = kernel("mla_decode_split_sparse"), f"T{k}", "1"
        dims["TOP"] = width(chosen[0])
        seen = {"length_ptr": low.place(pos), "seq_ptr": low.place(seq), "chosen_ptr": low.place(chosen[0])}
    split = low.phase.table.instance(spec, "any", **dims)
    split = typed(split, cache_types(cache), q_ptr=q, q_rope_ptr=rope)
    rows_ = f"{queries} * {heads}"
    splits, partial, lse = shares(low, k, f"{sequences} * ceildiv({rows_}, {split.tile.constants['BH']})", heads, rank)
    low.launch(split, group, {
        "q_ptr": at, "q_rope_ptr": rope_at, **parts, "pages_ptr": low.place(pages), **seen,
        "partial_ptr": partial, "lse_ptr": lse, "q_row": at.row, "q_head": at.head, "q_rope_row": rope_at.row,
        "q_rope_head": rope_at.head, "softmax_scale": op.attrs["scale"], "max_pages": str(tensor_of(pages).shape[1]),
        "splits": splits, "QUERIES": queries, "ROWS": rows_,
    }, {"B": sequences, "QUERIES": queries, "SPLITS": splits})  # fmt: skip
    join(low, group, partial, lse, splits, rows_, sequences)


def index(low: Lowering, group: Group) -> None:
    """The positions that each token attends to: scores of the cached index keys, then the best of them."""
    op = group.anchor
    q, weights, cache, layer, seq, pos, pages = op.operands
    assert isinstance(q, Value) and isinstance(cache, Value) and isinstance(layer, Value) and isinstance(pages, Value)
    kind = cache_of(cache)
    if kind.quant is not None:
        raise NoKernel(op=op.name, reason=f"the cache is {kind}")
    heads_, dim = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    row, top, page = int(kind.shape[3]), int(op.attrs["top_k"]), int(kind.shape[2])  # type: ignore[arg-type]
    dims = {"HEADS": heads_, "DIM": dim, "PAGE": page, "KEY_ROW": row, "TOP": top}
    score = Place(low.slot(low.phase.bounds[f"T{part(op)}"] * low.phase.bounds["C"] * 4), 0, 1, 1, 4)
    keys, at, tokens = low.cache(cache, layer).part(row - dim), low.place(q), str(tensor_of(q).shape[0])
    scores = typed(low.phase.table.instance(kernel("index_scores"), "any", **dims), q_ptr=q, weight_ptr=weights,
                   key_ptr=cache)  # fmt: skip
    low.launch(scores, group, {
        "q_ptr": at, "weight_ptr": low.place(weights), "key_ptr": keys, "pages_ptr": low.place(pages),
        "seq_ptr": low.place(seq), "pos_ptr": low.place(pos), "score_ptr": score, "q_row": at.row, "q_head": at.head,
        "weight_row": low.place(weights).row, "scale": op.attrs["scale"], "max_pages": str(tensor_of(pages).shape[1]),
        "width": "C",
    }, {"CONTEXT": "C", "T": tokens})  # fmt: skip
    select = low.phase.table.instance(kernel("index_select"), "any", TOP=top)
    low.launch(select, group, {
        "score_ptr": score, "pos_ptr": low.place(pos), "chosen_ptr": low.place(op.result), "width": "C",
    }, {"T": tokens})  # fmt: skip


def heads(low: Lowering, group: Group) -> None:
    """Attention with grouped heads: in one go for a prompt, by shares of the keys for single tokens."""
    op = group.anchor
    q, cache, layer, _, _, pages = op.operands[:6]
    assert isinstance(q, Value) and isinstance(cache, Value) and isinstance(layer, Value) and isinstance(pages, Value)
    if cache_of(cache).quant is not None:
        raise NoKernel(op=op.name, reason=f"the cache is {cache_of(cache)}")
    count, width_ = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    attrs, v = op.attrs, int(op.attrs["v"])  # type: ignore[arg-type]
    kv_heads = int(attrs["kv_heads"])  # type: ignore[arg-type]
    seen = {n.upper(): int(attrs.get(n, 0)) for n in ("window", "chunk")}  # type: ignore[arg-type]
    page = int(cache_of(cache).shape[2])  # type: ignore[arg-type]
    dims = {"HEADS": count, "KV_HEADS": kv_heads, "D": width_, "DV": v, "PAGE": page, **seen}
    dims["SOFTCAP"] = int("softcap" in attrs)
    given: dict[str, Any] = {
        "q_ptr": low.place(q), "cache_ptr": low.cache(cache, layer), "pages_ptr": low.place(pages),
        "q_start_ptr": given_place(op, "q_starts"),
        "length_ptr": given_place(op, "lengths"), "q_row": low.place(q).row,
        "q_head": low.place(q).head, "softmax_scale": attrs["scale"], "softcap": attrs.get("softcap", 1.0),
        "max_pages": str(tensor_of(pages).shape[1]),
    }  # fmt: skip
    types: dict[str, Value | WeightRef] = {"q_ptr": q, "cache_ptr": cache}
    sinks = ""
    if len(op.operands) == 7:
        sinks, given["sink_ptr"], types["sink_ptr"] = "_sinks", low.place(op.operands[6]), op.operands[6]
    k = part(op)
    rows_ = f"ceildiv(T{k}, B{k}) * {count}"
    if low.phase.shape != "decode":
        instance = low.phase.table.instance(kernel(f"heads_prefill{sinks}"), "any", **dims)
        more = {"out_ptr": low.place(op.result), "splits": 1, "ROWS": rows_}
        sizes: dict[str, int | str] = {"CONTEXT": f"ceildiv(T{k}, B{k})", "B": f"B{k}", "SPLITS": 1}
        low.launch(typed(instance, out_ptr=op.result, **types), group, {**given, **more}, sizes)
        return
    split = typed(low.phase.table.instance(kernel(f"heads_decode_split{sinks}"), "any", **dims), **types)
    blocks = f"B{k} * {kv_heads} * ceildiv(ceildiv(T{k}, B{k}) * {count // kv_heads}, {split.tile.constants['BM']})"
    splits, partial, lse = shares(low, k, blocks, count, v)
    given |= {"out_ptr": partial, "lse_ptr": lse, "splits": splits, "ROWS": rows_}
    low.launch(split, group, given, {"B": f"B{k}", "QUERIES": f"ceildiv(T{k}, B{k})", "SPLITS": splits})
    join(low, group, partial, lse, splits, rows_, f"B{k}")


def part(op: Op) -> str:
    """What the run-time symbols of an op's micro-batch end in."""
    return str(op.attrs.get("micro_batch", ""))


def given_place(op: Op, name: str) -> Place:
    """An input that the runtime makes for attention, of the op's micro-batch."""
    return Place(Base("input", f"{name}_{part(op)}" if part(op) else name), 0, 1, 1, 4)


def shares(low: Lowering, k: str, blocks: str, count: int, width_: int) -> tuple[str, Place, Place]:
    """How many shares of the keys, and room for their results and log-sum-exps.

    Enough programs to fill the device twice, where `blocks` run for one share.
    """
    splits = f"max(1, min({MOST_SPLITS}, {2 * low.phase.sms} // ({blocks})))"
    bounds = low.phase.bounds
    most_b, most_t = bounds[f"B{k}"], bounds[f"T{k}"]
    # Every sequence has equally many tokens; from 2 * sms of them on there is one share.
    few = [(b * q, b) for b in range(1, most_b + 1) for q in range(1, bounds["Q"] + 1)]
    few = [(t, b) for t, b in few if t <= min(most_t, 2 * low.phase.sms)] + [(most_t, most_b)]
    most = max(t * evaluate(splits, {f"T{k}": t, f"B{k}": b}) for t, b in few)
    partial = Place(low.slot(most * count * width_ * 4), 0, width_, width_, 4)
    return splits, partial, Place(low.slot(most * count * 4), 0, 1, 1, 4)


def join(low: Lowering, group: Group, partial: Place, lse: Place, splits: str, rows_: str, sequences: str) -> None:
    """The sum of the shares."""
    result = group.anchor.result
    width_ = int(tensor_of(result).shape[-1])  # type: ignore[arg-type]
    combine = typed(low.phase.table.instance(kernel("mla_decode_combine"), "any", DV=width_), out_ptr=result)
    low.launch(combine, group, {
        "partial_ptr": partial, "lse_ptr": lse, "out_ptr": low.place(result), "splits": splits, "ROWS": rows_,
    }, {"B": sequences, "ROWS": rows_})  # fmt: skip


def powers(op: Op, dims: dict[str, int]) -> None:
    """Raise NoKernel unless the widths of a head are powers of two."""
    for name, size in dims.items():
        if name != "HEADS" and (size < 16 or power_of_two(size) != size):
            raise NoKernel(op=op.name, reason=f"a head's width {name} = {size} is not a power of two from 16 up")
