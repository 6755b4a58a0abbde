"""The cache of keys and values per head, and attention over it with grouped heads (Ainslie et al. 2023, 2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Size, dim
from moec.ir.module import Module
from moec.ir.ops.attention import cache_width, check_batch
from moec.ir.ops.core import FLOATS
from moec.ir.optable import FLOAT, INT, STR, Attr, Attrs, OpDef, cache, index, require, same, tensor
from moec.ir.types import BITS, CacheType, TensorType, Type


def _width(kv: CacheType) -> Size:
    require(kv.kind == "kv.heads", f"kv must be kv.heads, got {kv.kind}")
    return cache_width(kv)


class CacheAppendHeads(OpDef):
    """Write the keys of all heads, then their values, into the cache: token t goes to `pos[t]` of sequence `seq[t]`."""

    name = "cache.append_heads"
    operands = "kv layer k v seq pos pages"
    results = ""
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        kv = cache(t[0])
        index(t[1])
        k, v = tensor(t[2], "k", 3, FLOATS), tensor(t[3], "v", 3, FLOATS)
        require(k.shape[:2] == v.shape[:2], f"tokens and heads of k and v differ: {k} and {v}")
        same(k.shape[1] * (k.shape[2] + v.shape[2]), _width(kv), "heads * (width of k and v) and cache width")
        check_batch(t[4], t[5], k.shape[0], t[6])
        return []

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        kv, layer, k, v, seq, pos, pages = x
        size = kv.shape[2]
        page = pages[seq.long(), (pos // size).long()].long()
        rows = ctx.torch.cat((k.flatten(1), v.flatten(1)), -1)
        kv[layer, page, (pos % size).long()] = ctx.round(rows, ctx.cache_type.dtype)
        return []

    def bytes_written(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        kv = cache(t[0])
        return tensor(t[2], "k").shape[0] * _width(kv) * BITS[kv.dtype] // 8


class AttnHeads(OpDef):
    """Causal attention with grouped heads over the cache: `h / kv_heads` query heads share a head of keys and values.

    Token t of sequence `seq[t]` sees the cached positions up to `pos[t]`: with `window` only the last `window` of them
    (Beltagy et al. 2020), with `chunk` only those of its own chunk of positions. `sinks[h]` joins each head's softmax
    as the score of a key without value (Xiao et al. 2023, 2309.17453). `softcap` bounds scores to c·tanh(s/c).
    `context` names the number of cached positions a token sees, for the cost.
    """

    name = "attn.heads"
    operands = "q kv layer seq pos pages sinks?"
    attrs = {
        "scale": FLOAT,
        "kv_heads": INT,
        "v": INT,
        "context": STR,
        "window": Attr("int", optional=True),
        "chunk": Attr("int", optional=True),
        "softcap": Attr("float", optional=True),
    }
    effect = "read"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        q, kv = tensor(t[0], "q", 3, FLOATS), cache(t[1])
        index(t[2])
        heads, groups, v = q.shape[1], int(a["kv_heads"]), int(a["v"])
        require(isinstance(heads, int) and groups >= 1 and heads % groups == 0, f"{heads} heads over {groups} kv_heads")
        require(v >= 1, f"v must be at least 1, got {v}")
        same(groups * (q.shape[2] + v), _width(kv), "kv_heads * (width of q and v) and cache width")
        check_batch(t[3], t[4], q.shape[0], t[5])
        for key in ("window", "chunk"):
            require(int(a.get(key, 1)) >= 1, f"{key} must be at least 1, got {a.get(key)}")
        require(float(a.get("softcap", 1.0)) > 0, f"softcap must be above 0, got {a.get('softcap')}")
        if len(t) == 7:
            same(tensor(t[6], "sinks", 1).shape[0], heads, "sinks and heads")
        dim(str(a["context"]))
        return [TensorType(q.dtype, (q.shape[0], heads, v))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        q, kv, layer, seq, pos, pages = x[:6]
        groups, v, size = int(a["kv_heads"]), int(a["v"]), kv.shape[2]
        last = torch.arange(int(pos.max()) + 1 if len(pos) else 0)
        out = q.new_zeros(q.shape[0], q.shape[1], v)
        for t in range(q.shape[0]):
            here = int(pos[t])
            first = max(0, here - int(a["window"]) + 1) if "window" in a else 0
            first = max(first, here // int(a["chunk"]) * int(a["chunk"])) if "chunk" in a else first
            p = last[first : here + 1]
            rows = kv[layer, pages[int(seq[t]), p // size].long(), p % size]
            k = rows[:, : groups * q.shape[2]].unflatten(-1, (groups, -1))
            values = rows[:, groups * q.shape[2] :].unflatten(-1, (groups, v))
            mine = q[t].unflatten(0, (groups, -1))
            scores = torch.einsum("ghd,sgd->ghs", mine, k) * a["scale"]
            if "softcap" in a:
                scores = (scores / a["softcap"]).tanh() * a["softcap"]
            if len(x) == 7:
                sink = x[6].to(scores.dtype).reshape(groups, -1, 1)
                weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            out[t] = torch.einsum("ghs,sgd->ghd", weights, values).flatten(0, 1)
        return [out]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q = tensor(t[0], "q")
        return q.shape[0] * q.shape[1] * seen(a) * (q.shape[2] + int(a["v"])) * 2

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q, kv = tensor(t[0], "q"), cache(t[1])
        return q.nbytes() + q.shape[0] * seen(a) * _width(kv) * BITS[kv.dtype] // 8


def seen(a: Attrs) -> Size:
    """Cached positions that a token of `attn.heads` sees at most."""
    bound = [int(a[key]) for key in ("window", "chunk") if key in a]
    return dim(f"min({a['context']}, {min(bound)})") if bound else dim(str(a["context"]))
