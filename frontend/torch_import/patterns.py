"""Patterns over nodes of an exported graph: what they match, and the parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moec.frontend.torch_import.exported import shape

_SAME = ("to.", "_assert_tensor_metadata", "contiguous", "clone", "alias", "detach", "type_as", "lift_fresh", "float")
_VIEWS = ("view.", "reshape.", "transpose.int", "unsqueeze", "squeeze", "flatten", "unflatten", "permute", "expand.")


def op(node: Any) -> str:
    """`linear.default` of an aten call; empty otherwise."""
    text = str(node.target) if isinstance(node, Node) and node.op == "call_function" else ""
    return text.removeprefix("aten.") if text.startswith("aten.") else ("getitem" if "getitem" in text else "")


def same(node: Any) -> Any:
    """The node behind casts, copies and dropout without effect."""
    while isinstance(node, Node) and (
        op(node).startswith(_SAME) or (op(node).startswith("dropout") and (not node.args[1] or not node.args[2]))
    ):
        node = node.args[0]
    return node


def unview(node: Any) -> Any:
    """The node behind views too."""
    node = same(node)
    while isinstance(node, Node) and op(node).startswith(_VIEWS):
        node = same(node.args[0])
    return node


def is_view(node: Node) -> bool:
    """Whether a node moves no element."""
    return op(node).startswith(_VIEWS) or op(node).startswith(_SAME)


def pair(node: Any, name: str) -> tuple[Any, Any] | None:
    """Both operands of a binary op."""
    node = same(node)
    return (same(node.args[0]), same(node.args[1])) if op(node).startswith(name) else None


def parameter(node: Any) -> bool:
    """Whether a node is a parameter or buffer."""
    return isinstance(node, Node) and node.op == "placeholder" and node.name != "input_ids"


@dataclass(frozen=True)
class Rms:
    """x / sqrt(mean(x^2) + eps) · w; w None without a weight."""

    x: Node
    weight: Node | None
    eps: float


def rms(node: Any) -> Rms | None:
    """An RMS norm, the weight on either side."""
    both = pair(node, "mul.Tensor")
    if both is None:
        return None
    for w, rest in (both, both[::-1]):
        if parameter(w) and len(shape(w)) == 1:
            bare = _bare_rms(rest)
            if bare is not None:
                return Rms(bare[0], w, bare[1])
    bare = _bare_rms(same(node))
    return Rms(bare[0], None, bare[1]) if bare else None


def _bare_rms(node: Any) -> tuple[Node, float] | None:
    both = pair(node, "mul.Tensor")
    for x, root in (both, both[::-1]) if both else ():
        if not op(root).startswith("rsqrt"):
            continue
        total = same(root.args[0])
        if not op(total).startswith("add.Tensor"):
            continue
        mean = same(total.args[0])
        if op(mean).startswith("mean.dim"):
            power = same(mean.args[0])
            if op(power).startswith("pow.Tensor_Scalar") and power.args[1] == 2 and same(power.args[0]) is x:
                return x, float(total.args[1])
    return None


@dataclass(frozen=True)
class Turned:
    """A rotary embedding of the first `dims` elements of each head, pairs i and i + dims/2."""

    x: Node
    cos: Node
    dims: int


def rope(node: Any) -> Turned | None:
    """`x · cos + rotate_half(x) · sin`, of whole heads or of a leading part that is joined with the rest."""
    node = same(node)
    if op(node).startswith("cat"):
        parts = [same(p) for p in node.args[0]]
        if len(parts) == 2:
            turned = rope(parts[0])
            if turned is not None and op(parts[1]).startswith("slice"):
                whole = same(parts[1].args[0])
                lead = same(turned.x.args[0]) if op(turned.x).startswith("slice") else turned.x
                if lead is whole and parts[1].args[2] == turned.dims:
                    return Turned(whole, turned.cos, turned.dims)
        return _rope_by_halves(parts)
    both = pair(node, "add.Tensor")
    left, right = (pair(both[0], "mul.Tensor"), pair(both[1], "mul.Tensor")) if both else (None, None)
    if left is None or right is None:
        return None
    x, cos = left
    half = _rotated_half(right[0])
    if half is not None and half is x:
        return Turned(x, cos, int(shape(x)[-1]))
    return None


def _rotated_half(node: Any) -> Node | None:
    node = same(node)
    if not op(node).startswith("cat") or len(node.args[0]) != 2:
        return None
    negative, first = same(node.args[0][0]), same(node.args[0][1])
    if not op(negative).startswith("neg") or not op(first).startswith("slice"):
        return None
    second = same(negative.args[0])
    x = same(first.args[0])
    if op(second).startswith("slice") and same(second.args[0]) is x and second.args[2] * 2 == shape(x)[-1]:
        return x  # type: ignore[no-any-return]
    return None


def _rope_by_halves(parts: list[Any]) -> Turned | None:
    """`cat(a · cos - b · sin, b · cos + a · sin)` of the halves a, b of a head."""
    if len(parts) != 2:
        return None
    minus, plus = pair(parts[0], "sub.Tensor"), pair(parts[1], "add.Tensor")
    first = pair(minus[0], "mul.Tensor") if minus and plus else None
    if first is None or op(first[0]) != "getitem" or first[0].args[1] != 0:
        return None
    x = same(first[0].args[0].args[0])
    return Turned(x, first[1], int(shape(x)[-1]))


@dataclass(frozen=True)
class Attention:
    """Softmax attention; keys and values before they are repeated for the heads that share them."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float


def attention(node: Any) -> Attention | None:
    """Eager attention or scaled_dot_product_attention."""
    node = same(node)
    if op(node).startswith("scaled_dot_product_attention"):
        q, k, v = (same(a) for a in node.args[:3])
        rest = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
        scale = rest.get("scale") or int(shape(q)[-1]) ** -0.5
        causal = bool(rest.get("is_causal"))
        return Attention(q, _unrepeated(k), _unrepeated(v), rest.get("attn_mask"), causal, float(scale))
    if not op(node).startswith("matmul"):
        return None
    weights, v = same(node.args[0]), same(node.args[1])
    if not op(weights).startswith(("softmax", "_softmax")):
        return None
    scores, mask = same(weights.args[0]), None
    if op(scores).startswith("add.Tensor"):
        scores, mask = same(scores.args[0]), same(scores.args[1])
    scale = 1.0
    if op(scores).startswith(("mul.Tensor", "div.Tensor")) and isinstance(scores.args[1], int | float):
        scale = float(scores.args[1]) if op(scores).startswith("mul") else 1.0 / float(scores.args[1])
        scores = same(scores.args[0])
    if not op(scores).startswith("matmul") or not op(same(scores.args[1])).startswith("transpose"):
        return None
    q, k = same(scores.args[0]), same(same(scores.args[1]).args[0])
    return Attention(q, _unrepeated(k), _unrepeated(v), mask, False, scale)


def _unrepeated(node: Any) -> Node:
    """Keys or values before `repeat_kv`."""
    node = same(node)
    if op(node).startswith(("reshape", "view")):
        wide = same(node.args[0])
        if op(wide).startswith("expand"):
            before = same(wide.args[0])
            if op(before).startswith("unsqueeze"):
                return same(before.args[0])  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Glu:
    """silu(gate) · up."""

    gate: Node
    up: Node


def glu(node: Any) -> Glu | None:
    """The gated activation, either side first."""
    both = pair(node, "mul.Tensor")
    for left, right in (both, both[::-1]) if both else ():
        if op(left).startswith("silu"):
            return Glu(same(left.args[0]), right)
    return None


@dataclass(frozen=True)
class Experts:
    """Batched products with the weights of each token's experts, summed by the gate's weights."""

    x: Node
    ids: Node
    weights: Node
    gate_up: Node
    down: Node


def experts(node: Any) -> Experts | None:
    """`sum(view(bmm(down[ids], silu(gate) · up) · weights))` over the chosen experts."""
    node = same(node)
    if not op(node).startswith("sum.dim") or list(node.args[1]) != [1]:
        return None
    both = pair(unview(node.args[0]), "mul.Tensor")
    if both is None:
        return None
    last = unview(both[0])
    chosen = _chosen(last)
    inner = glu(unview(last.args[1])) if chosen else None
    if chosen is None or inner is None or op(inner.gate) != "getitem":
        return None
    first = unview(same(inner.gate.args[0]).args[0])
    up = _chosen(first)
    if up is None:
        return None
    rows = unview(first.args[1])
    x = same(rows.args[0]) if op(rows).startswith("repeat_interleave") else rows
    if op(rows).startswith("index.Tensor"):
        x = same(rows.args[0])
    return Experts(unview(x), unview(up[1]), unview(both[1]), up[0], chosen[0])


def _chosen(node: Any) -> tuple[Node, Node] | None:
    """Weight and ids of `bmm(weight[ids], ...)`."""
    if not op(node).startswith("bmm"):
        return None
    weight = same(node.args[0])
    if not op(weight).startswith("index.Tensor"):
        return None
    return same(weight.args[0]), weight.args[1][0]


@dataclass(frozen=True)
class Gate:
    """The choice of experts: see `moe.route`."""

    x: Node
    weight: Node
    bias: Node | None
    attrs: dict[str, Any]


def gate(ids: Any, weights: Any) -> Gate | None:
    """The gate whose top-k gave `ids`, and whose scores, gathered and scaled, gave `weights`."""
    ids, weights = unview(ids), unview(weights)
    if op(ids) != "getitem" or ids.args[1] != 1:
        return None
    top = ids.args[0]
    scale, normalise = 1.0, False
    if op(weights).startswith("mul.Tensor") and isinstance(weights.args[1], int | float):
        scale, weights = float(weights.args[1]), same(weights.args[0])
    if op(weights).startswith("div"):
        normalise, weights = True, same(weights.args[0])
    after = op(weights).startswith("softmax")
    if after:
        # A softmax over the chosen logits is the softmax over all, normalised.
        normalise, weights = True, same(weights.args[0])
    gathered = op(weights).startswith("gather")
    scores = same(weights.args[0]) if gathered else weights
    choice = same(top.args[0])
    attrs: dict[str, Any] = {"groups": 1, "top_groups": 1, "group_score": "top2", "top_k": int(top.args[1])}
    if not gathered and (op(scores) != "getitem" or scores.args[0] is not top):
        return None
    bias = None
    if gathered:
        if op(choice).startswith("masked_fill"):
            attrs |= _groups(choice)
            choice = same(choice.args[0])
        if op(choice).startswith("add.Tensor") and parameter(unview(choice.args[1])):
            bias, choice = unview(choice.args[1]), same(choice.args[0])
        if unview(choice) is not unview(scores):
            return None
    score = "softmax" if after else {"softmax": "softmax", "sigmoid": "sigmoid"}.get(op(choice).partition(".")[0], "")
    product = choice if after else same(choice.args[0]) if score else None
    product = unview(product)
    if not score or not op(product).startswith("linear") or len(product.args) > 2:
        return None
    attrs |= {"score": score, "normalise": normalise, "scale": scale}
    return Gate(product.args[0], product.args[1], bias, attrs)


def _groups(masked: Node) -> dict[str, int]:
    """Groups and chosen groups of a masked choice: the dims of the view by groups, the k of the top-k over them."""
    groups = chosen = 1
    pending, seen = [masked.args[1]], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if op(node).startswith("topk") and len(shape_of_topk(node)) == 2:
            chosen, groups = int(node.args[1]), int(shape_of_topk(node)[-1])  # type: ignore[arg-type]
            break
        pending += node.all_input_nodes
    return {"groups": groups, "top_groups": chosen}


def shape_of_topk(node: Node) -> tuple[Any, ...]:
    """Dims of what a top-k chooses from."""
    source = node.args[0]
    return shape(source) if isinstance(source, Node) else ()
