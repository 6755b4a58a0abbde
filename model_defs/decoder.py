"""The forward pass of every decoder with keys and values per head, from its `spec.Decoder`."""

from __future__ import annotations

from typing import Any

from torch import nn

from moec.model_defs import functional as F
from moec.model_defs import spec
from moec.model_defs.layers import Computed, Layers, Mlp, Turn, computed, weight
from moec.model_defs.rope import table_attrs

Tensor = Any


class Norm(nn.Module):
    """The norm of a family over the last dim: root mean square, or layer norm with a bias."""

    def __init__(self, width: int, c: spec.Decoder) -> None:
        super().__init__()
        self.eps = c.eps
        self.weight = weight(width)
        self.bias = weight(width) if c.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Attention with grouped heads over cached keys and values."""

    def __init__(self, c: spec.Decoder, a: spec.Attention) -> None:
        super().__init__()
        self.a, self.eps = a, c.eps
        wide, narrow = a.heads * a.dim, a.kv_heads * a.dim
        self.q, self.k, self.v = (weight(n, c.hidden_size) for n in (wide, narrow, narrow))
        self.o = weight(c.hidden_size, wide)
        self.q_bias, self.k_bias, self.v_bias = (weight(n) if a.bias else None for n in (wide, narrow, narrow))
        self.o_bias = weight(c.hidden_size) if a.out_bias else None
        self.sinks = weight(a.heads) if a.sinks else None
        self.q_norm, self.k_norm = (_norm_weight(a, n) for n in (a.heads, a.kv_heads))
        self.rope = _rope_table(a.rope, c) if a.rope else None
        self.temperature = _temperature(a, c) if a.temperature else None

    def heads(self, x: Tensor, w: Tensor, bias: Tensor | None, norm: Tensor | None, count: int) -> Tensor:
        """One projection as heads [T, count, dim], with the norms that come before the rotation."""
        a = self.a
        y = F.linear(x, w, bias)
        if norm is not None and a.norm == "wide":
            y = F.rms_norm(y, norm, self.eps)
        if a.clip:
            y = F.clamp(y, a.clip)
        y = F.unflatten(y, count, a.dim)
        early = norm is not None and a.norm != "wide" and not a.norm_after_rope
        return F.rms_norm(y, norm, self.eps) if early else y

    def turned(self, x: Tensor, norm: Tensor | None, pos: Tensor) -> Tensor:
        """Query or key behind its rotation, and behind the norm that comes after it."""
        a = self.a
        if a.rope is not None:
            x = F.rope(x, pos, self.rope, 0, a.rope.dims, a.rope.interleaved)
        late = norm is not None and a.norm_after_rope
        return F.rms_norm(x, norm, self.eps) if late else x

    def forward(self, layer: Tensor, x: Tensor, kv: Tensor, seq: Tensor, pos: Tensor, pages: Tensor) -> Tensor:
        a = self.a
        q = self.heads(x, self.q, self.q_bias, self.q_norm, a.heads)
        k = self.heads(x, self.k, self.k_bias, self.k_norm, a.kv_heads)
        v = self.heads(x, self.v, self.v_bias, None, a.kv_heads)
        q, k = self.turned(q, self.q_norm, pos), self.turned(k, self.k_norm, pos)
        if self.temperature is not None:
            q = F.rope(q, pos, self.temperature, 0, a.dim, False)
        F.append_heads(kv, layer, k, v, seq, pos, pages)
        bounds = {key: size for key, size in (("window", a.window), ("chunk", a.chunk)) if size}
        attrs = {"scale": float(a.scale), "kv_heads": a.kv_heads, "v": a.dim, **bounds}
        y = F.attention(q, kv, layer, seq, pos, pages, self.sinks, **attrs)
        return F.linear(F.flatten(y), self.o, self.o_bias)


def _norm_weight(a: spec.Attention, heads: int) -> nn.Parameter | None:
    if a.norm == "plain":
        return computed("ones", "weight.fill", (a.dim,), shape=(a.dim,), value=1.0)
    return weight(heads * a.dim if a.norm == "wide" else a.dim) if a.norm else None


def _rope_table(rope: Any, c: spec.Decoder) -> Computed:
    ropes = list(dict.fromkeys(layer.attention.rope for layer in c.layers if layer.attention.rope))
    name = "rope_table" if len(ropes) == 1 else f"rope_table_{ropes.index(rope)}"
    attrs = table_attrs(rope, c.max_position_embeddings)
    return computed(name, "weight.rope_table", (c.max_position_embeddings, rope.dims), **attrs)


def _temperature(a: spec.Attention, c: spec.Decoder) -> Computed:
    assert a.temperature is not None
    attrs = {"floor": a.temperature.floor, "scale": a.temperature.scale}
    shape = (c.max_position_embeddings, a.dim)
    return computed("temperature", "weight.temperature_table", shape, positions=shape[0], dims=shape[1], **attrs)


class Moe(nn.Module):
    """Routed experts beside shared ones; the gate computes in FP32."""

    def __init__(self, hidden: int, m: spec.Experts) -> None:
        super().__init__()
        self.m = m
        self.gate = weight(m.count, hidden)
        self.gate_bias = weight(m.count) if m.gate.bias else None
        self.experts_gate_up = weight(m.count, 2 * m.inter, hidden)
        self.experts_down = weight(m.count, hidden, m.inter)
        self.experts_gate_up_bias = weight(m.count, 2 * m.inter) if m.bias else None
        self.experts_down_bias = weight(m.count, hidden) if m.bias else None
        self.shared = Mlp(hidden, m.shared, m.shared_bias, m.glu) if m.shared else None
        self.shared_gate = weight(1, hidden) if m.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        m, g = self.m, self.m.gate
        more: dict[str, Any] = {"bias_to": g.bias} if g.bias == "logits" else {}
        more |= {"jitter": float(g.jitter)} if g.score == "sparsemixer" else {}
        ids, weights = F.route(
            x, self.gate, self.gate_bias, score=g.score, groups=g.groups, top_groups=g.top_groups, group_score="top2",
            top_k=g.top_k, normalise=g.normalise, scale=float(g.scale), **more,
        )  # fmt: skip
        biases = (self.experts_gate_up_bias, self.experts_down_bias) if m.bias else ()
        y = F.experts(
            x, ids, weights, self.experts_gate_up, self.experts_down, m.count, biases, m.weigh_input, **dict(m.glu)
        )
        if self.shared is None:
            return y
        beside = self.shared(x)
        if self.shared_gate is not None:
            beside = F.gate_rows(beside, F.linear(x, self.shared_gate))
        return F.add(y, beside)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, c: spec.Decoder, layer: spec.Layer) -> None:
        super().__init__()
        feed = layer.feed
        self.scale = c.residual_scale
        self.input_norm = Norm(c.hidden_size, c)
        self.attn = Attention(c, layer.attention)
        self.post_norm = Norm(c.hidden_size, c)
        dense = isinstance(feed, spec.Dense)
        self.mlp = Mlp(c.hidden_size, feed.inter, feed.bias, feed.glu) if dense else Moe(c.hidden_size, feed)  # type: ignore[arg-type]

    def forward(self, layer: Tensor, x: Tensor, kv: Tensor, seq: Tensor, pos: Tensor, pages: Tensor) -> Tensor:
        x = F.add(x, F.scale(self.attn(layer, self.input_norm(x), kv, seq, pos, pages), self.scale))
        return F.add(x, F.scale(self.mlp(self.post_norm(x)), self.scale))


class Model(nn.Module):
    """Token ids to logits of the wanted rows; layers of a kind, and turns of unlike layers, are traced once."""

    def __init__(self, c: spec.Decoder) -> None:
        super().__init__()
        self.c = c
        self.embed = weight(c.vocab_size, c.hidden_size)
        self.stacks: list[str] = []
        for first, period, turns in spec.stacks(c.layers):
            parts: list[nn.Module] = [Layer(c, layer) for layer in c.layers[first : first + period]]
            one = period == 1
            kind = ("dense" if isinstance(c.layers[first].feed, spec.Dense) else "moe") if one else "mixed"
            name = f"{kind}_layers"
            name += f"_{first}" if name in self.stacks else ""
            body, start = (parts[0], first) if one else (Turn(parts, first), 0)
            self.add_module(name, Layers(body, start, start + turns - 1))
            self.stacks.append(name)
        self.norm = Norm(c.hidden_size, c)
        self.head = weight(c.vocab_size, c.hidden_size)
        self.head_bias = weight(c.vocab_size) if c.head_bias else None

    def forward(
        self, ids: Tensor, seq: Tensor, pos: Tensor, pages: Tensor, starts: Tensor, rows: Tensor, kv: Tensor
    ) -> Tensor:
        x = F.scale(F.embed(ids, self.embed), self.c.embed_scale)
        for name in self.stacks:
            x = getattr(self, name)(x, kv, seq, pos, pages)
        # The last scale goes in before the head: it is a product with the same constant.
        x = F.scale(self.norm(F.rows(x, rows)), self.c.logit_scale)
        return F.linear(x, self.head, self.head_bias, out="f32")
