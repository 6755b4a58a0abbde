"""Where the positions of sequences lie in the paged cache, as standard ONNX ops."""

from __future__ import annotations

from moec.codegen.onnx.graph import Graph


def slots(g: Graph, kv: str, layer: str, pages: str, seq: str, pos: str) -> str:
    """i64[n, 3]: layer, page and slot of positions `pos` of sequences `seq` (i64[n] each)."""
    size = g.dim(kv, 2)
    number = g.concat([g.unsqueeze(seq, 1), g.unsqueeze(g("Div", pos, size), 1)], 1)
    page = g("GatherND", g.cast(pages, "int64"), number)
    lay = g("Expand", g.reshape(layer, 1), g("Shape", pos))
    return g.concat([g.unsqueeze(v, 1) for v in (lay, page, g("Mod", pos, size))], 1)


def cached(g: Graph, kv: str, layer: str, pages: str) -> tuple[str, str, str]:
    """All positions of all sequences, one after the other: rows [s, width], their sequence and position i64[s]."""
    size, width = g.dim(kv, 2), g.dim(kv, 3)
    here = g("Gather", g("Gather", kv, layer, axis=0), pages, axis=0)
    rows = g("Reshape", here, g.concat([g.const([-1]), width], 0))
    one = g("Mul", g.dim(pages, 1), size)
    r = g("Range", g.const(0), g.scalar(g("Mul", g.dim(pages, 0), one)), g.const(1))
    return rows, g("Div", r, one), g("Mod", r, one)
