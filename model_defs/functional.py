"""The ops of the IR as functions for model definitions: `F.linear(x, w)` records one `linear`.

Definitions are traced, never run: calling one on tensors raises TypeError. Operand and attribute meanings are those of
the op table (`docs/ir-reference.md`); dims in names: T tokens, S cached rows, h heads, k top-k.
"""

from __future__ import annotations

from typing import Any

import torch.fx

Tensor = Any
"""A traced value; model definitions never see data."""


def apply(op: str, *operands: Any, **attrs: Any) -> Any:
    """Record one op of the table; only a tracer can call it."""
    raise TypeError(f"model definitions are traced, not run (op {op}); use moec.trace(...)")


torch.fx.wrap("apply")


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """`embed`: activations take the model's element type."""
    return apply("embed", ids, table, dtype="bf16")


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """`norm.rms`."""
    return apply("norm.rms", x, w, eps=float(eps))


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, out: str | None = None) -> Tensor:
    """`linear`."""
    operands = (x, w) if bias is None else (x, w, bias)
    return apply("linear", *operands, **({"out": out} if out else {}))


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """`norm.layer`."""
    return apply("norm.layer", x, w, b, eps=float(eps))


def swiglu(x: Tensor, **attrs: Any) -> Tensor:
    """`swiglu`."""
    return apply("swiglu", x, **attrs)


def scale(x: Tensor, factor: float) -> Tensor:
    """`scale`; a factor of 1 records nothing."""
    return x if factor == 1.0 else apply("scale", x, factor=float(factor))


def clamp(x: Tensor, limit: float) -> Tensor:
    """`clamp`."""
    return apply("clamp", x, limit=float(limit))


def gate_rows(x: Tensor, g: Tensor) -> Tensor:
    """`gate.rows`."""
    return apply("gate.rows", x, g)


def layer_number(layer: Tensor, scale: int, offset: int) -> Tensor:
    """`index.affine`; the layer itself where that is what it computes."""
    return layer if (scale, offset) == (1, 0) else apply("index.affine", layer, scale=scale, offset=offset)


def add(a: Tensor, b: Tensor) -> Tensor:
    """`add`."""
    return apply("add", a, b)


def split(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """`split`."""
    parts = apply("split", x, sizes=tuple(sizes))
    return tuple(parts[i] for i in range(len(sizes)))


def unflatten(x: Tensor, *sizes: int) -> Tensor:
    """`unflatten`."""
    return apply("unflatten", x, sizes=tuple(sizes))


def flatten(x: Tensor) -> Tensor:
    """`flatten`."""
    return apply("flatten", x)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """`rows.gather`."""
    return apply("rows.gather", x, index)


def rope(x: Tensor, pos: Tensor, table: Tensor, offset: int, dims: int, interleaved: bool) -> Tensor:
    """`rope`."""
    return apply("rope", x, pos, table, offset=offset, dims=dims, interleaved=bool(interleaved))


def cache_append(
    kv: Tensor, layer: Tensor, latent: Tensor, key_rope: Tensor, seq: Tensor, pos: Tensor, pages: Tensor
) -> None:
    """`cache.append`."""
    apply("cache.append", kv, layer, latent, key_rope, seq, pos, pages)


def append_index(kv: Tensor, layer: Tensor, key: Tensor, seq: Tensor, pos: Tensor, pages: Tensor) -> None:
    """`cache.append_index`."""
    apply("cache.append_index", kv, layer, key, seq, pos, pages)


def choose_positions(
    q: Tensor,
    weights: Tensor,
    kv: Tensor,
    layer: Tensor,
    seq: Tensor,
    pos: Tensor,
    pages: Tensor,
    scale: float,
    top_k: int,
) -> Tensor:
    """`attn.index`: positions `[T, top_k]`."""
    return apply("attn.index", q, weights, kv, layer, seq, pos, pages, scale=float(scale), top_k=top_k, context="C")


def cache_read(
    kv: Tensor, layer: Tensor, pages: Tensor, starts: Tensor, rank: int, index: int = 0
) -> tuple[Tensor, Tensor]:
    """`cache.read` of all cached rows, S in number; `index`: width of the index keys beside them."""
    more = {"index": index} if index else {}
    both = apply("cache.read", kv, layer, pages, starts, length="S", rank=rank, dtype="bf16", **more)
    return both[0], both[1]


def mla(
    q: Tensor,
    kv: Tensor,
    key_rope: Tensor,
    seq: Tensor,
    pos: Tensor,
    starts: Tensor,
    chosen: Tensor | None,
    scale: float,
    nope: int,
    v: int,
) -> Tensor:
    """`attn.mla`."""
    operands = (q, kv, key_rope, seq, pos, starts, *([] if chosen is None else [chosen]))
    return apply("attn.mla", *operands, scale=float(scale), nope=nope, v=v)


def append_heads(kv: Tensor, layer: Tensor, k: Tensor, v: Tensor, seq: Tensor, pos: Tensor, pages: Tensor) -> None:
    """`cache.append_heads`."""
    apply("cache.append_heads", kv, layer, k, v, seq, pos, pages)


def attention(
    q: Tensor,
    kv: Tensor,
    layer: Tensor,
    seq: Tensor,
    pos: Tensor,
    pages: Tensor,
    sinks: Tensor | None,
    **attrs: Any,
) -> Tensor:
    """`attn.heads`: [T, h, v]."""
    operands = (q, kv, layer, seq, pos, pages) if sinks is None else (q, kv, layer, seq, pos, pages, sinks)
    return apply("attn.heads", *operands, context="C", **attrs)


def route(x: Tensor, gate: Tensor, bias: Tensor | None, **attrs: Any) -> tuple[Tensor, Tensor]:
    """`moe.route`: ids and weights `[T, k]`."""
    both = apply("moe.route", *((x, gate) if bias is None else (x, gate, bias)), **attrs)
    return both[0], both[1]


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    count: int,
    biases: tuple[Tensor, ...] = (),
    weigh_input: bool = False,
    **attrs: Any,
) -> Tensor:
    """`moe.dispatch`, `moe.experts` and `moe.combine`; with `weigh_input` the weights go in before the experts."""
    sent = apply("moe.dispatch", x, ids, experts=count)
    rows, order = sent[0], sent[2]
    if weigh_input:
        rows = apply("moe.weigh", rows, order, weights)
    done = apply("moe.experts", rows, sent[1], gate_up, down, *biases, **attrs)
    return apply("moe.combine", done, order) if weigh_input else apply("moe.combine", done, order, weights)
