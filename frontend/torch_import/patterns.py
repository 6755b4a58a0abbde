"""Patterns over nodes of an exported graph: what they match, and the parts of it."""

from __future__ import annotations

from dataclasses import dataclass, field
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


def part(node: Any, number: int) -> Node | None:
    """The split whose part of this number the node is."""
    node = same(node)
    if op(node) != "getitem" or node.args[1] != number:
        return None
    source = node.args[0]
    return source if op(source).startswith(("split", "chunk")) else None


def joined(node: Node) -> list[Any]:
    """The parts that lie behind one another in the last dim: of a `cat`, or copied into an empty tensor."""
    if op(node).startswith("cat"):
        return [same(p) for p in node.args[0]]  # type: ignore[union-attr]
    if not op(node).startswith("new_empty"):
        return []
    parts = {}
    for user in node.users:
        given: Any = user.args
        into: Any = next(iter(user.users), None) if op(user).startswith("slice") else None
        if into is not None and op(into).startswith("copy_") and given[1] == len(shape(node)) - 1:
            parts[int(given[2])] = same(into.args[1])
    return [parts[start] for start in sorted(parts)]


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
class Attention:
    """Softmax attention; keys and values before they are repeated for the heads that share them."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    sinks: Node | None = None


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
    without_last = op(weights).startswith("slice") and weights.args[2:4] == (0, -1)
    if without_last:
        weights = same(weights.args[0])
    if not op(weights).startswith(("softmax", "_softmax")):
        return None
    scores, mask, sinks = _unshifted(weights.args[0]), None, None
    if without_last:
        if not op(scores).startswith("cat") or len(scores.args[0]) != 2:
            return None
        scores, sinks = same(scores.args[0][0]), unview(scores.args[0][1])
        if not parameter(sinks):
            return None
    if op(scores).startswith("add.Tensor"):
        scores, mask = same(scores.args[0]), same(scores.args[1])
    scale = 1.0
    if op(scores).startswith(("mul.Tensor", "div.Tensor")) and isinstance(scores.args[1], int | float):
        scale = float(scores.args[1]) if op(scores).startswith("mul") else 1.0 / float(scores.args[1])
        scores = same(scores.args[0])
    if not op(scores).startswith("matmul") or not op(same(scores.args[1])).startswith("transpose"):
        return None
    q, k = same(scores.args[0]), same(same(scores.args[1]).args[0])
    return Attention(q, _unrepeated(k), _unrepeated(v), mask, False, scale, sinks)


def _unshifted(node: Any) -> Any:
    """The scores of a softmax before their maximum was taken off, which changes nothing."""
    node = same(node)
    if op(node).startswith("sub.Tensor"):
        top = same(node.args[1])
        top = top.args[0] if op(top) == "getitem" else top
        if op(top).startswith(("max.dim", "amax")) and same(top.args[0]) is same(node.args[0]):
            return same(node.args[0])
    return node


def _unrepeated(node: Any) -> Node:
    """Keys or values before `repeat_kv`."""
    node = same(node)
    if op(node).startswith(("reshape", "view")):
        wide = same(node.args[0])
        if op(wide).startswith("expand"):
            before = same(wide.args[0])
            while op(before).startswith("slice") and shape(before) == shape(same(before.args[0])):
                before = same(before.args[0])
            if op(before).startswith("unsqueeze"):
                return same(before.args[0])  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Glu:
    """act(gate) · up, or the clamped form of gpt-oss: g · sigmoid(alpha · g) · (u + shift) within limits."""

    gate: Node
    up: Node
    attrs: dict[str, Any] = field(default_factory=dict)


def glu(node: Any) -> Glu | None:
    """The gated activation, either side first."""
    both = pair(node, "mul.Tensor")
    for left, right in (both, both[::-1]) if both else ():
        if op(left).startswith("silu"):
            return Glu(same(left.args[0]), right)
        if op(left).startswith(("gelu", "relu.")):
            tanh = left.kwargs.get("approximate") == "tanh"
            name = "relu" if op(left).startswith("relu") else "gelu_tanh" if tanh else "gelu"
            return Glu(same(left.args[0]), right, {"act": name})
        clamped = _clamped_glu(left, right)
        if clamped is not None:
            return clamped
    return None


def _clamped_glu(shifted: Any, gated: Any) -> Glu | None:
    """`(clamp(up) + shift) · (g · sigmoid(g · alpha))` with g = clamp(gate) from above."""
    parts = pair(gated, "mul.Tensor")
    if not op(shifted).startswith("add.Tensor") or not isinstance(shifted.args[1], int | float) or parts is None:
        return None
    g, sigmoid = parts
    inner: Any = same(sigmoid.args[0]) if op(sigmoid).startswith("sigmoid") else None
    if not op(inner).startswith("mul.Tensor") or same(inner.args[0]) is not g:
        return None
    up = same(shifted.args[0])
    if not (op(g).startswith("clamp") and op(up).startswith("clamp")):
        return None
    limit = float(g.args[2])
    if g.args[1] is not None or [float(v) for v in up.args[1:3]] != [-limit, limit]:
        return None
    attrs = {"limit": limit, "alpha": float(inner.args[1]), "shift": float(shifted.args[1])}
    return Glu(same(g.args[0]), same(up.args[0]), attrs)


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
    if op(choice).startswith("masked_fill"):
        attrs |= _groups(choice)
        choice = same(choice.args[0])
    if gathered:
        if op(choice).startswith("add.Tensor") and parameter(unview(choice.args[1])):
            bias, choice = unview(choice.args[1]), same(choice.args[0])
        if unview(choice) is not unview(scores):
            return None
    score = "softmax" if after else {"softmax": "softmax", "sigmoid": "sigmoid"}.get(op(choice).partition(".")[0], "")
    product = choice if after else same(choice.args[0]) if score else None
    product = unview(product)
    if not score or not op(product).startswith("linear"):
        return None
    if len(product.args) > 2 and product.args[2] is not None:
        if bias is not None:
            return None
        bias = same(product.args[2])
        attrs["bias_to"] = "logits"
    attrs |= {"score": score, "normalise": normalise, "scale": scale}
    return Gate(product.args[0], product.args[1], bias, attrs)


def _groups(masked: Node) -> dict[str, Any]:
    """Groups and chosen groups of a masked choice: the dims of the view by groups, the k of the top-k over them.

    Groups are ranked by the sum of their best two, or by their best.
    """
    groups = chosen = 1
    by = "top2"
    pending, seen = [masked.args[1]], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if op(node).startswith("topk") and len(shape_of_topk(node)) == 2:
            chosen, groups = int(node.args[1]), int(shape_of_topk(node)[-1])  # type: ignore[arg-type]
            rank = same(node.args[0])
            rank = rank.args[0] if op(rank) == "getitem" else rank
            by = "max" if op(rank).startswith(("max.", "amax")) else "top2"
            break
        pending += node.all_input_nodes
    return {"groups": groups, "top_groups": chosen, "group_score": by}


def shape_of_topk(node: Node) -> tuple[Any, ...]:
    """Dims of what a top-k chooses from."""
    source = node.args[0]
    return shape(source) if isinstance(source, Node) else ()
