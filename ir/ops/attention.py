"""The latent cache and multi-head latent attention, plain and absorbed (DeepSeek-V2, arXiv 2405.04434, sec. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Size, dim, minimum
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS
from moec.ir.optable import FLOAT, INT, STR, Attr, Attrs, OpDef, cache, index, require, same, tensor
from moec.ir.types import BITS, CacheType, TensorType, Type

INDEXED = "kv.indexed"
"""A cache with an index key behind each row's latent and rotary key; see `attn.index`."""


def cache_width(kv: CacheType) -> Size:
    """Width of a cached row; raises TypeRuleError unless the cache has its four dims."""
    require(len(kv.shape) == 4, f"kv must have dims [layers, pages, tokens a page, width], got {kv}")
    return kv.shape[3]


def _holds(kv: CacheType, width: Size, what: str) -> None:
    """A row of the cache holds `width` elements, in an indexed cache beside the index key."""
    whole = cache_width(kv)
    if kv.kind != INDEXED:
        same(width, whole, f"{what} and cache width")
    else:
        fits = isinstance(width, int) and isinstance(whole, int) and width < whole
        require(fits, f"{what} must leave room for an index key, got {width} of {whole}")


def _chosen(t: Sequence[Type], at: int, tokens: Size) -> None:
    if len(t) > at:
        same(tensor(t[at], "chosen", 2, ("i32",)).shape[0], tokens, "tokens of q and chosen")


def _seen(t: Sequence[Type], at: int, context: Size) -> Size:
    """Positions that a token attends to: those of its context, or of them the chosen ones."""
    if len(t) <= at:
        return context
    return minimum(context, tensor(t[at], "chosen").shape[1])


def check_batch(seq: Type, pos: Type, tokens: Size, pages: Type | None = None) -> None:
    """Raise TypeRuleError unless `seq` and `pos` have a number for each token, and `pages` is a table of pages."""
    for t, what in ((seq, "seq"), (pos, "pos")):
        same(tensor(t, what, 1, ("i32",)).shape[0], tokens, f"tokens of x and {what}")
    if pages is not None:
        tensor(pages, "pages", 2, ("i32",))


class CacheAppend(OpDef):
    """Write `[latent | key_rope]` into the latent cache: token t goes to position `pos[t]` of sequence `seq[t]`."""

    name = "cache.append"
    operands = "kv layer latent key_rope seq pos pages"
    results = ""
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        kv = cache(t[0])
        index(t[1])
        latent, rope = tensor(t[2], "latent", 2, FLOATS), tensor(t[3], "key_rope", 2, FLOATS)
        _holds(kv, latent.shape[1] + rope.shape[1], "latent + rope width")
        same(latent.shape[0], rope.shape[0], "tokens of latent and key_rope")
        check_batch(t[4], t[5], latent.shape[0], t[6])
        return []

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        kv, layer, latent, rope, seq, pos, pages = x
        size = kv.shape[2]
        page = pages[seq.long(), (pos // size).long()].long()
        kv[layer, page, (pos % size).long(), : latent.shape[1] + rope.shape[1]] = ctx.cached(latent, rope)
        return []

    def bytes_written(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        kv, latent = cache(t[0]), tensor(t[2], "latent")
        if kv.kind == INDEXED:
            return latent.shape[0] * (latent.shape[1] + tensor(t[3], "key_rope").shape[1]) * BITS[kv.dtype] // 8
        return latent.shape[0] * kv.row_bytes()


class CacheRead(OpDef):
    """All cached positions of all sequences in turn: sequence b fills rows `starts[b]..starts[b+1]` of `length`.

    `index`: width of the index key at the end of a row, which is not read.
    """

    name = "cache.read"
    operands = "kv layer pages starts"
    attrs = {
        "length": STR,
        "rank": INT,
        "dtype": Attr("str", choices=FLOATS),
        "index": Attr("int", optional=True),
    }
    results = "latent key_rope"
    effect = "read"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        kv = cache(t[0])
        index(t[1])
        tensor(t[2], "pages", 2, ("i32",))
        tensor(t[3], "starts", 1, ("i32",))
        rank, width = int(a["rank"]), cache_width(kv)
        require(isinstance(width, int) and 0 < rank < width, f"rank {rank} must be below the cache width {width}")
        assert isinstance(width, int)
        beside = int(a.get("index", 0))
        require(0 <= beside < width - rank, f"index {beside} leaves no rotary key of the cache width {width}")
        require((beside > 0) == (kv.kind == INDEXED), f"index must be the index key's width in {kv}, got {beside}")
        length = dim(str(a["length"]))
        dtype = str(a["dtype"])
        return [TensorType(dtype, (length, rank)), TensorType(dtype, (length, width - beside - rank))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        kv, layer, pages, starts = x
        size = kv.shape[2]
        rows = []
        for b in range(pages.shape[0]):
            p = ctx.torch.arange(int(starts[b + 1] - starts[b]))
            rows.append(kv[layer, pages[b, p // size].long(), p % size])
        flat = ctx.torch.cat(rows) if rows else kv.new_zeros(0, kv.shape[3])
        return [flat[:, : a["rank"]], flat[:, a["rank"] : flat.shape[1] - a.get("index", 0)]]

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        kv = cache(t[0])
        return tensor(r[0], "latent").shape[0] * kv.row_bytes()


class AttnMla(OpDef):
    """Plain multi-head latent attention over expanded keys and values, causal within each sequence.

    `q[T, h, nope + rope]`, `kv[S, h·(nope + v)]` as the up-projection writes it, `key_rope[S, rope]` for all
    heads. Token t sees the first `pos[t] + 1` rows of its sequence, which starts at row `starts[seq[t]]`; of them the
    positions `chosen[t]` where these are given (-1: none; see `attn.index`).
    """

    name = "attn.mla"
    operands = "q kv key_rope seq pos starts chosen?"
    attrs = {"scale": FLOAT, "nope": INT, "v": INT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        q, kv, rope = (
            tensor(t[0], "q", 3, FLOATS),
            tensor(t[1], "kv", 2, FLOATS),
            tensor(t[2], "key_rope", 2, FLOATS),
        )
        nope, v = int(a["nope"]), int(a["v"])
        require(nope >= 0 and v >= 1, f"nope must be at least 0 and v at least 1, got {nope} and {v}")
        same(q.shape[2], rope.shape[1] + nope, "width of q and nope + rope")
        same(kv.shape[1], q.shape[1] * (nope + v), "width of kv and heads * (nope + v)")
        same(kv.shape[0], rope.shape[0], "rows of kv and key_rope")
        check_batch(t[3], t[4], q.shape[0])
        tensor(t[5], "starts", 1, ("i32",))
        _chosen(t, 6, q.shape[0])
        return [TensorType(q.dtype, (q.shape[0], q.shape[1], v))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        q, kv, rope, seq, pos, starts, *chosen = x
        nope = int(a["nope"])
        kv = kv.unflatten(-1, (q.shape[1], -1))
        scores = ctx.torch.einsum("thd,shd->ths", q[..., :nope], kv[..., :nope])
        scores = scores + ctx.torch.einsum("thd,sd->ths", q[..., nope:], rope)
        rows = ctx.torch.arange(kv.shape[0])
        first = starts[seq.long()].long()
        seen = (rows >= first[:, None]) & (rows <= (first + pos)[:, None])
        if chosen:
            wanted = ctx.torch.where(chosen[0] >= 0, first[:, None] + chosen[0], kv.shape[0])
            mine = ctx.torch.zeros(len(first), kv.shape[0] + 1, dtype=ctx.torch.bool).scatter_(1, wanted.long(), True)
            seen &= mine[:, :-1]
        scores = (scores * a["scale"]).masked_fill(~seen[:, None, :], float("-inf"))
        return [ctx.torch.einsum("ths,shd->thd", scores.softmax(-1), kv[..., nope:])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q, kv = tensor(t[0], "q"), tensor(t[1], "kv")
        width = q.shape[2] + int(a["v"])
        return q.shape[0] * q.shape[1] * _seen(t, 6, kv.shape[0]) * width * 2


class AttnMlaAbsorbed(OpDef):
    """Latent attention in the absorbed form: scores and sums over the latent cache itself, shared by all heads.

    `q_latent[T, h, rank]`, `q_rope[T, h, rope]`; token t sees cached positions `0..pos[t]` of its sequence, or of them
    the positions `chosen[t]` where these are given (-1: none; see `attn.index`). `context` names the number of cached
    positions a token could see, for the cost.
    """

    name = "attn.mla_absorbed"
    operands = "q_latent q_rope kv layer seq pos pages chosen?"
    attrs = {"scale": FLOAT, "context": STR}
    effect = "read"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        q, rope, kv = tensor(t[0], "q_latent", 3, FLOATS), tensor(t[1], "q_rope", 3, FLOATS), cache(t[2])
        index(t[3])
        same(q.shape[1], rope.shape[1], "heads of q_latent and q_rope")
        _holds(kv, q.shape[2] + rope.shape[2], "latent + rope width")
        check_batch(t[4], t[5], q.shape[0], t[6])
        _chosen(t, 7, q.shape[0])
        dim(str(a["context"]))
        return [q]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        q, rope, kv, layer, seq, pos, pages, *chosen = x
        size = kv.shape[2]
        out = ctx.torch.empty_like(q)
        full = ctx.torch.cat((q, rope), -1)
        for t in range(q.shape[0]):
            p = chosen[0][t][chosen[0][t] >= 0].long() if chosen else ctx.torch.arange(int(pos[t]) + 1)
            keys = kv[layer, pages[int(seq[t]), p // size].long(), p % size, : full.shape[2]]
            weights = (full[t] @ keys.T * a["scale"]).softmax(-1)
            out[t] = weights @ keys[:, : q.shape[2]]
        return [out]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q, rope = tensor(t[0], "q_latent"), tensor(t[1], "q_rope")
        seen = _seen(t, 7, dim(str(a["context"])))
        return q.shape[0] * q.shape[1] * seen * (q.shape[2] * 2 + rope.shape[2]) * 2

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q, rope, kv = tensor(t[0], "q_latent"), tensor(t[1], "q_rope"), cache(t[2])
        cached = q.shape[0] * _seen(t, 7, dim(str(a["context"]))) * kv.row_bytes()
        return q.nbytes() + rope.nbytes() + cached
