"""Raising: nodes of one layer (or of what is outside the layers) become ops of the IR, from the result backwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from moec.errors import InputError
from moec.frontend.torch_import import patterns as P
from moec.frontend.torch_import.experts import experts, sparsemixer
from moec.frontend.torch_import.exported import Exported, shape, where
from moec.frontend.torch_import.latent import Latent, latent
from moec.frontend.torch_import.rotary import Turned, rope, tempered
from moec.frontend.torch_import.weights import Weights
from moec.ir import Builder, Location, Value
from moec.ir.module import Operand

POINTWISE = ("relu", "gelu", "tanh", "sigmoid", "silu", "exp")


class NotRaised(InputError):
    """A node that no pattern knows and that is no plain tensor op of one input."""

    template: ClassVar[str] = "{module}: {op} of shape {shape} is none of the forms that are raised ({why})"


@dataclass
class Report:
    """What became of the graph: ops by the pattern that made them, and those that stayed plain, with the reason."""

    raised: Counter[str] = field(default_factory=Counter)
    plain: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Ops that were raised, of all."""
        total = sum(self.raised.values())
        return total / (total + len(self.plain)) if total else 0.0

    def __str__(self) -> str:
        ops = ", ".join(f"{name} {count}" for name, count in sorted(self.raised.items()))
        lines = [f"{self.share:.1%} of the ops raised: {ops}", *(f"plain: {line}" for line in self.plain)]
        return "\n".join(lines)


class Raiser:
    """Raises the nodes of one function: `known` are values that stand for nodes from outside."""

    def __init__(
        self,
        exported: Exported,
        builder: Builder,
        weights: Weights,
        report: Report,
        known: dict[Node, Value],
        state: dict[str, Operand],
        head: Node | None = None,
    ) -> None:
        self.exported = exported
        self.builder = builder
        self.weights = weights
        self.report = report
        self.known = known
        self.state = state
        self.head = head

    def value(self, node: Any) -> Value:
        """The IR value of a node: [T, width], or [T, heads, width]."""
        node = P.same(node)
        if node not in self.known:
            self.known[node] = self._raise(node)
        return self.known[node]

    def emit(self, name: str, node: Node, *operands: Operand, **attrs: Any) -> Any:
        """Append an op for a node."""
        self.report.raised[name] += 1
        return self.builder.emit(name, *operands, loc=_location(node), **attrs)

    def fail(self, node: Node, why: str) -> NotRaised:
        """The error of a node that cannot be raised."""
        return NotRaised(module=where(node), op=P.op(node) or node.op, shape=list(node.meta["val"].shape), why=why)

    def _raise(self, node: Node) -> Value:
        name = P.op(node)
        turns = (self._norm, self._rope, self._tempered)
        for rule in (*turns, self._attention, self._experts, self._glu, self._gated, self._part):
            found = rule(node)
            if found is not None:
                return found
        if name.startswith("embedding"):
            ids, table = self.state["ids"], self.weights.table(node.args[0])
            return self.emit("embed", node, ids, table, dtype="bf16")  # type: ignore[no-any-return]
        if name.startswith("linear"):
            return self._linear(node)
        if name.startswith("slice") and node.args[2] in (0, None) and _whole(node):
            return self.value(node.args[0])
        if P.is_view(node):
            return self._view(node)
        if name.startswith(("add.Tensor", "add_.Tensor")) and isinstance(node.args[1], Node):
            return self.emit("add", node, self.value(node.args[0]), self.value(node.args[1]))  # type: ignore[no-any-return]
        if name.startswith(("mul.Tensor", "div.Tensor")) and isinstance(node.args[1], int | float):
            factor = float(node.args[1])
            factor = factor if name.startswith("mul") else 1.0 / factor
            return self.emit("scale", node, self.value(node.args[0]), factor=factor)  # type: ignore[no-any-return]
        if name.startswith(("clamp", "clamp_")) and node.args[1] == -node.args[2]:  # type: ignore[operator]
            return self.emit("clamp", node, self.value(node.args[0]), limit=float(node.args[2]))  # type: ignore[no-any-return, arg-type]
        base = name.partition(".")[0]
        if base in POINTWISE:
            self.report.plain.append(f"{where(node)}: {base}, which no pattern takes in")
            y = self.builder.emit("tensor.pointwise", self.value(node.args[0]), loc=_location(node), function=base)
            assert isinstance(y, Value)
            return y
        raise self.fail(node, "no pattern matches")

    def _norm(self, node: Node) -> Value | None:
        if P.op(node).startswith("layer_norm"):
            given: Any = node.args
            operands = (self.value(given[0]), self.weights.ref(given[2]), self.weights.ref(given[3]))
            return self.emit("norm.layer", node, *operands, eps=float(given[4]))  # type: ignore[no-any-return]
        found = P.rms(node)
        if found is None:
            return None
        w = self.weights.ref(found.weight) if found.weight is not None else self.weights.ones(int(shape(node)[-1]))
        return self.emit("norm.rms", node, self.value(found.x), w, eps=found.eps)  # type: ignore[no-any-return]

    def _rope(self, node: Node) -> Value | None:
        found = rope(node)
        return None if found is None else self._turned(node, found, self.value(found.x))

    def _tempered(self, node: Node) -> Value | None:
        """A factor of each position on queries: a turn by no angle, times the factor."""
        found = tempered(node)
        if found is None:
            return None
        steps = torch.floor((torch.arange(min(self.weights.positions, 512)) + 1) / found.floor)
        factors = self.exported.value(found.factor, len(steps)).reshape(-1)
        if not torch.allclose(factors, steps.log1p() * found.scale + 1):
            raise self.fail(node, "a temperature of something else than positions")
        x, width = self.value(found.x), int(shape(found.x)[-1])
        table = self.weights.temperature(width, found.floor, found.scale)
        return self.emit("rope", node, x, self.state["pos"], table, offset=0, dims=width, interleaved=False)  # type: ignore[no-any-return]

    def _turned(self, node: Node, found: Turned, x: Value) -> Value:
        """A rotary embedding of `x`, with the table of its angles."""
        try:
            table, dims = self.weights.rope(self.exported, P.unview(found.cos), found.dims)
        except LookupError:
            raise self.fail(node, "the angles depend on no buffer of frequencies") from None
        if dims != found.dims:
            raise self.fail(node, f"{dims} angles turn {found.dims} elements")
        attrs = {"offset": found.offset, "dims": dims, "interleaved": found.interleaved}
        return self.emit("rope", node, x, self.state["pos"], table, **attrs)  # type: ignore[no-any-return]

    def _attention(self, node: Node) -> Value | None:
        found = P.attention(node)
        if found is None:
            return None
        compressed = latent(found)
        if compressed is not None:
            return self._latent_attention(node, found, compressed)
        q, k, v = (self.value(n) for n in (found.q, found.k, found.v))
        heads, width = int(v.type.shape[1]), int(v.type.shape[2])  # type: ignore[union-attr, arg-type]
        kv, layer = self.state["kv"], self.state["l"]
        batch = [self.state[n] for n in ("seq", "pos", "pages")]
        self.emit("cache.append_heads", node, kv, layer, k, v, *batch)
        attrs: dict[str, Any] = {"scale": found.scale, "kv_heads": heads, "v": width, "context": "C"}
        attrs |= self._bounds(node, found)
        sinks = [self.weights.vector(found.sinks)] if found.sinks is not None else []
        return self.emit("attn.heads", node, q, kv, layer, *batch, *sinks, **attrs)  # type: ignore[no-any-return]

    def _latent_attention(self, node: Node, found: P.Attention, given: Latent) -> Value:
        """Latent and rotary key go to the cache; keys and values are projected from what it holds."""
        if self._bounds(node, found):
            raise self.fail(node, "latent attention has no window")
        kv, layer, starts = (self.state[n] for n in ("kv", "l", "starts"))
        seq, pos, pages = (self.state[n] for n in ("seq", "pos", "pages"))
        q, x = self.value(found.q), self.value(given.latent)
        key = self._turned(node, given.key, self.value(P.unview(given.key.x)))
        self.emit("cache.append", node, kv, layer, x, key, seq, pos, pages)
        attrs: dict[str, Any] = {"length": "S", "rank": given.rank, "dtype": "bf16"}
        cached, keys = self.emit("cache.read", node, kv, layer, pages, starts, **attrs)
        expanded = self.emit("linear", node, cached, self.weights.ref(given.up))
        attrs = {"scale": found.scale, "nope": given.nope, "v": given.v}
        return self.emit("attn.mla", node, q, expanded, keys, seq, pos, starts, **attrs)  # type: ignore[no-any-return]

    def _part(self, node: Node) -> Value | None:
        """One part of a split of rows; all parts are known then."""
        at: Any = node.args
        split: Any = P.part(node, at[1]) if P.op(node) == "getitem" else None
        if split is None or len(features(split.args[0])) != 1:
            return None
        parts: dict[Any, Any] = {n.args[1]: n for n in split.users if P.op(n) == "getitem"}
        if sorted(parts) != list(range(len(parts))):
            raise self.fail(node, "parts of a split are not used")
        sizes = tuple(features(parts[i])[-1] for i in range(len(parts)))
        values = self.emit("split", node, self.value(split.args[0]), sizes=sizes)
        self.known.update({parts[i]: v for i, v in enumerate(values)})
        return self.known[node]

    def _bounds(self, node: Node, found: P.Attention) -> dict[str, int]:
        """The window or the chunks that the mask shows, besides causal ones; other masks are refused."""
        if found.mask is None:
            if not found.causal:
                raise self.fail(node, "attention without a causal mask")
            return {}
        length = min(self.weights.positions, 512)
        mask = self.exported.value(P.same(found.mask), length)
        mask = mask.reshape(mask.shape[-2:])
        seen = mask if mask.dtype == torch.bool else mask > -1.0
        rows = torch.arange(length)
        distance = rows[:, None] - rows
        causal, window = distance >= 0, int(seen[-1].sum())
        if torch.equal(seen, causal & (distance < window)):
            return {"window": window} if window < length else {}
        alone = (seen.sum(-1) == 1).nonzero()[1:]
        chunk = int(alone[0]) if len(alone) else length
        if torch.equal(seen, causal & (rows[:, None] // chunk == rows // chunk)):
            return {"chunk": chunk}
        raise self.fail(node, "the mask is neither causal nor a window nor in chunks")

    def _glu(self, node: Node) -> Value | None:
        found = P.glu(node)
        if found is None:
            return None
        gate, up = P.same(found.gate), P.same(found.up)
        plain = all(P.op(n).startswith("linear") for n in (gate, up))
        if not plain or P.same(gate.args[0]) is not P.same(up.args[0]):
            return None
        x = self.value(gate.args[0])
        joined = self.weights.joined([gate.args[1], up.args[1]])
        biases = [self.weights.joined([gate.args[2], up.args[2]])] if len(gate.args) > 2 and gate.args[2] else []
        wide = self.emit("linear", gate, x, joined, *biases)
        return self.emit("swiglu", node, wide, **found.attrs)  # type: ignore[no-any-return]

    def _gated(self, node: Node) -> Value | None:
        both = P.pair(node, "mul.Tensor")
        for left, right in (both, both[::-1]) if both else ():
            if P.op(left).startswith("sigmoid") and shape(left)[-1] == 1 and isinstance(right, Node):
                rows = self.value(left.args[0])
                return self.emit("gate.rows", node, self.value(right), rows)  # type: ignore[no-any-return]
        return None

    def _experts(self, node: Node) -> Value | None:
        found = experts(node)
        if found is None:
            return None
        gate = found.gate or P.gate(found.ids, found.weights) or sparsemixer(found.ids, found.weights)
        if gate is None:
            raise self.fail(node, "the experts' gate is not a known one")
        x = self.value(found.x)
        bias = [self.weights.vector(gate.bias)] if gate.bias is not None else []
        ids, weights = self.emit("moe.route", node, x, self.weights.ref(gate.weight), *bias, **gate.attrs)
        how = {"transposed": found.transposed}
        up = self.weights.stacked(found.gate_up, interleaved=found.interleaved, **how)
        down = self.weights.stacked(found.down, **how)
        biases = [self.weights.stacked(b, interleaved=found.interleaved and not i) for i, b in enumerate(found.biases)]
        count = int(shape(found.down)[0])
        rows, offsets, order = self.emit("moe.dispatch", node, x, ids, experts=count)
        if found.gate is not None:
            rows = self.emit("moe.weigh", node, rows, order, weights)
        done = self.emit("moe.experts", node, rows, offsets, up, down, *biases, **found.attrs)
        beside = [weights] if found.gate is None else []
        return self.emit("moe.combine", node, done, order, *beside)  # type: ignore[no-any-return]

    def _linear(self, node: Node) -> Value:
        x, w, *b = node.args
        bias = [self.weights.ref(b[0])] if b and b[0] is not None else []
        out = {"out": "f32"} if node is self.head else {}
        return self.emit("linear", node, self.value(x), self.weights.ref(w), *bias, **out)  # type: ignore[no-any-return]

    def _view(self, node: Node) -> Value:
        source = P.same(node.args[0])
        before, after = features(source), features(node)
        x = self.value(source)
        if before == after:
            return x
        if len(before) == 1 and len(after) == 2 and before[0] == after[0] * after[1]:
            return self.emit("unflatten", node, x, sizes=tuple(after))  # type: ignore[no-any-return]
        if len(before) == 2 and len(after) == 1:
            return self.emit("flatten", node, x)  # type: ignore[no-any-return]
        raise self.fail(node, f"a view of {before} as {after}")


def features(node: Node) -> list[int]:
    """Dims of one token: without the batch of one in front and the tokens, wherever they stand."""
    dims = list(shape(node))
    if len(dims) > 2 and dims[0] == 1:
        dims = dims[1:]
    return [d for d in dims if isinstance(d, int)]


def _whole(node: Node) -> bool:
    return len(node.args) < 4 or node.args[3] is None or int(node.args[3]) > 1 << 40 or isinstance(node.args[3], Node)  # type: ignore[arg-type]


def _location(node: Node) -> Location | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return Location(str(stack[-1][0]) or "module", 0) if stack else None
