"""The lightning indexer of sparse attention: index keys in the cache, and the choice of positions by their scores.

DeepSeek-V3.2 (arXiv 2512.02556, sec. 2.1). A cache `kv.indexed` holds `[latent | rotary key | index key]` a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Size, dim
from moec.ir.module import Module
from moec.ir.ops.attention import INDEXED
from moec.ir.ops.core import FLOATS
from moec.ir.optable import FLOAT, INT, STR, Attrs, OpDef, cache, index, require, same, tensor
from moec.ir.types import BITS, CacheType, TensorType, Type


def _indexed(kv: CacheType, width: Size) -> None:
    require(kv.kind == INDEXED and len(kv.shape) == 4, f"kv must be {INDEXED} of four dims, got {kv}")
    inside = isinstance(width, int) and isinstance(kv.shape[3], int) and width < kv.shape[3]
    require(inside, f"an index key of {width} must be narrower than the cache's {kv.shape[3]}")


class CacheAppendIndex(OpDef):
    """Write index keys to the end of the cached rows: token t goes to position `pos[t]` of sequence `seq[t]`."""

    name = "cache.append_index"
    operands = "kv layer key seq pos pages"
    results = ""
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        kv, key = cache(t[0]), tensor(t[2], "key", 2, FLOATS)
        index(t[1])
        _indexed(kv, key.shape[1])
        for operand, what in ((t[3], "seq"), (t[4], "pos")):
            same(tensor(operand, what, 1, ("i32",)).shape[0], key.shape[0], f"tokens of key and {what}")
        tensor(t[5], "pages", 2, ("i32",))
        return []

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        kv, layer, key, seq, pos, pages = x
        size = kv.shape[2]
        page = pages[seq.long(), (pos // size).long()].long()
        kv[layer, page, (pos % size).long(), -key.shape[1] :] = ctx.round(key, ctx.cache_type.dtype)
        return []

    def bytes_written(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        key = tensor(t[2], "key")
        return key.shape[0] * key.shape[1] * BITS[cache(t[0]).dtype] // 8


class AttnIndex(OpDef):
    """The `top_k` cached positions with the best index scores, of each token, in rising order; -1 where there are less.

    The score of position s of `0..pos[t]` is the sum over heads j of `weights[t, j]` · relu(`scale` · `q[t, j]` · k_s).
    `context` names the number of cached positions a token sees, for the cost.
    """

    name = "attn.index"
    operands = "q weights kv layer seq pos pages"
    attrs = {"scale": FLOAT, "top_k": INT, "context": STR}
    effect = "read"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        q, weights, kv = tensor(t[0], "q", 3, FLOATS), tensor(t[1], "weights", 2, FLOATS), cache(t[2])
        index(t[3])
        same(q.shape[1], weights.shape[1], "heads of q and weights")
        same(q.shape[0], weights.shape[0], "tokens of q and weights")
        _indexed(kv, q.shape[2])
        for operand, what in ((t[4], "seq"), (t[5], "pos")):
            same(tensor(operand, what, 1, ("i32",)).shape[0], q.shape[0], f"tokens of q and {what}")
        tensor(t[6], "pages", 2, ("i32",))
        require(int(a["top_k"]) >= 1, f"top_k must be at least 1, got {a['top_k']}")
        dim(str(a["context"]))
        return [TensorType("i32", (q.shape[0], int(a["top_k"])))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        q, weights, kv, layer, seq, pos, pages = x
        size = kv.shape[2]
        out = torch.full((q.shape[0], a["top_k"]), -1, dtype=torch.int32)
        for t in range(q.shape[0]):
            p = torch.arange(int(pos[t]) + 1)
            keys = kv[layer, pages[int(seq[t]), p // size].long(), p % size, -q.shape[2] :]
            scores = weights[t] @ (q[t] @ keys.T * a["scale"]).relu()
            k = min(int(a["top_k"]), len(p))
            out[t, :k] = scores.topk(k).indices.sort().values.int()
        return [out]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q = tensor(t[0], "q")
        return q.shape[0] * q.shape[1] * dim(str(a["context"])) * (q.shape[2] + 1) * 2

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        q, weights, kv = tensor(t[0], "q"), tensor(t[1], "weights"), cache(t[2])
        # Tokens of one sequence share its keys; this is what a step of one token a sequence reads.
        keys = dim(str(a["context"])) * q.shape[2] * BITS[kv.dtype] // 8
        return q.nbytes() + weights.nbytes() + q.shape[0] * keys
