"""Bodies of sparse attention (DeepSeek-V3.2, arXiv 2512.02556, sec. 2.1): index keys in the cache, chosen positions."""

from __future__ import annotations

from onnx import TensorProto

from moec.codegen.onnx.cached import cached, slots
from moec.codegen.onnx.graph import Graph
from moec.ir import CacheType, Op, TensorType

NOWHERE = 1 << 40
"""A position behind every other."""


def append_index(g: Graph, op: Op, x: list[str]) -> list[str]:
    """The rows of the tokens with their index keys exchanged."""
    kv, layer, key, seq, pos, pages = x
    cache, keys = op.operands[0].type, op.operands[2].type
    assert isinstance(cache, CacheType) and isinstance(keys, TensorType)
    index = slots(g, kv, layer, pages, g.cast(seq, "int64"), g.cast(pos, "int64"))
    if cache.dtype == "bf16":
        key = g.cast(g("Cast", key, to=TensorProto.BFLOAT16), "float32")
    before = g("Slice", g("GatherND", kv, index), g.const([0]), g.const([-int(keys.shape[1])]), g.const([-1]))  # type: ignore[arg-type]
    return [g("ScatterND", kv, index, g.concat([before, key], -1))]


def choose(g: Graph, op: Op, x: list[str]) -> list[str]:
    """Positions with the best scores: TopK takes the first of equal ones."""
    q, weights, kv, layer, seq, pos, pages = x
    t = op.operands[0].type
    assert isinstance(t, TensorType)
    k, width = int(op.attrs["top_k"]), int(t.shape[2])  # type: ignore[arg-type]
    rows, of, at = cached(g, kv, layer, pages)
    keys = g("Slice", rows, g.const([-width]), g.const([NOWHERE]), g.const([-1]))
    products = g("MatMul", g("Transpose", q, perm=[1, 0, 2]), g("Transpose", keys, perm=[1, 0]))
    scores = g("Relu", g("Mul", products, g.f32(float(op.attrs["scale"]))))  # type: ignore[arg-type]
    shares = g.unsqueeze(g("Transpose", weights, perm=[1, 0]), 2)
    scores = g("ReduceSum", g("Mul", scores, shares), g.const([0]), keepdims=0)
    here = g("Equal", g.unsqueeze(g.cast(seq, "int64"), 1), of)
    here = g("And", here, g("LessOrEqual", at, g.unsqueeze(g.cast(pos, "int64"), 1)))
    lowest = g.f32(float("-inf"))
    scores = g("Where", here, scores, lowest)
    # There may be fewer positions than are chosen.
    more = g("Expand", lowest, g.concat([g.dim(q, 0), g.const([k])], 0))
    best, found = g("TopK", g.concat([scores, more], 1), g.const([k]), outputs=2, axis=-1, largest=1, sorted=1)
    seen = g("Greater", best, lowest)
    nowhere = g.const(NOWHERE)
    place = g("Where", seen, g("Gather", at, g("Where", seen, found, g.const(0)), axis=0), nowhere)
    rising, _ = g("TopK", place, g.const([k]), outputs=2, axis=-1, largest=0, sorted=1)
    return [g.cast(g("Where", g("Less", rising, nowhere), rising, g.const(-1)), "int32")]


def only_chosen(g: Graph, mask: str, chosen: str, at: str) -> str:
    """bool[T, s]: of what the mask shows, the chosen positions; `at`: positions of the keys, [s] or [T, s]."""
    last = g("Add", g("ReduceMax", at, keepdims=0), g.const(1))
    room = g.concat([g.dim(chosen, 0), g("Add", g.reshape(last, 1), g.const([1]))], 0)
    ids = g.cast(chosen, "int64")
    ids = g("Where", g("Less", ids, g.const(0)), last, ids)
    ones = g("Expand", g.const(1), g("Shape", ids))
    marks = g("ScatterElements", g("Expand", g.const(0), room), ids, ones, axis=1)
    here = g("Expand", g("Max", at, g.const(0)), g("Shape", mask))
    return str(g("And", mask, g("Greater", g("GatherElements", marks, here, axis=1), g.const(0))))
