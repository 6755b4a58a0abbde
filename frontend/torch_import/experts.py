"""Patterns of routed experts: products with the weights of each row's expert, batched or grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from moec.frontend.torch_import.patterns import Gate, Glu, glu, op, pair, parameter, same, unview


@dataclass(frozen=True)
class Experts:
    """Batched products with the weights of each token's experts, summed by the gate's weights."""

    x: Node
    ids: Node
    weights: Node
    gate_up: Node
    down: Node
    biases: tuple[Node, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    interleaved: bool = False
    gate: Gate | None = None
    """Of experts that weigh their input: the gate, which is part of the form."""


def experts(node: Any) -> Experts | None:
    """`sum(view(bmm(down[ids], silu(gate) · up) · weights))` over the chosen experts.

    Or the same of rows that were sorted by expert for grouped products, and brought back into order; or all experts at
    once, see `_at_once`.
    """
    node = same(node)
    if op(node).startswith("sum.dim") and list(node.args[1]) == [0]:
        return _at_once(node)
    if not op(node).startswith("sum.dim") or list(node.args[1]) != [1]:
        return None
    weighted = unview(node.args[0])
    order = _order(weighted)
    both = pair(weighted if order is None else weighted.args[0], "mul.Tensor")
    if both is None:
        return None
    last, weights = _chosen(both[0]), unview(both[1])
    if order is not None:
        if not op(weights).startswith("index.Tensor") or same(weights.args[1][0]) is not order:
            return None
        weights = unview(weights.args[0])
    inner = glu(unview(last.rows)) if last else None
    if last is None or inner is None:
        return None
    interleaved, joined = _halves(inner)
    first = _chosen(joined) if joined is not None else None
    if first is None or first.transposed != last.transposed or (first.bias is None) != (last.bias is None):
        return None
    rows = unview(first.rows)
    x = same(rows.args[0]) if op(rows).startswith(("repeat_interleave", "index.Tensor")) else rows
    return Experts(
        unview(x),
        unview(first.ids),
        weights,
        first.weight,
        last.weight,
        tuple(b for b in (first.bias, last.bias) if b is not None),
        inner.attrs,
        first.transposed,
        interleaved,
    )


def _at_once(node: Node) -> Experts | None:
    """`sum_e(bmm(silu(gate) · up, down))` of every token times its share of every expert, which is 0 where not chosen.

    The shares are a sigmoid of the best logits and of minus infinity elsewhere (Llama 4).
    """
    last = unview(node.args[0])
    inner = glu(unview(last.args[0])) if _stacked(last) else None
    _, joined = _halves(inner) if inner else (False, None)
    first = unview(joined)
    both = pair(unview(first.args[0]), "mul.Tensor") if _stacked(first) else None
    if inner is None or both is None or not op(both[0]).startswith("repeat"):
        return None
    shares = unview(both[1])
    shares = unview(shares.args[0]) if op(shares).startswith(("transpose", "permute")) else shares
    kept: Any = same(shares.args[0]) if op(shares).startswith("sigmoid") else None
    if not op(kept).startswith("scatter") or not op(kept.args[0]).startswith("full"):
        return None
    if kept.args[0].args[1] != float("-inf"):
        return None
    ids, best = same(kept.args[2]), same(kept.args[3])
    top = ids.args[0] if op(ids) == "getitem" and ids.args[1] == 1 else None
    logits: Any = same(top.args[0]) if top is not None else None
    if top is None or op(best) != "getitem" or best.args[0] is not top or not op(logits).startswith("linear"):
        return None
    attrs = {"score": "sigmoid", "groups": 1, "top_groups": 1, "group_score": "top2", "top_k": int(top.args[1])}
    chosen = Gate(logits.args[0], logits.args[1], None, attrs | {"normalise": False, "scale": 1.0})
    up, down = same(first.args[1]), same(last.args[1])
    return Experts(unview(both[0].args[0]), ids, best, up, down, (), inner.attrs, transposed=True, gate=chosen)


def _stacked(node: Any) -> bool:
    """Whether a node is a batched product with one parameter for each of the batch."""
    return op(node).startswith("bmm") and parameter(same(node.args[1]))


def _halves(found: Glu) -> tuple[bool, Any]:
    """Whether gate and up take turns in the product that both are parts of, and the product."""
    gate, up = found.gate, found.up
    if op(gate) == "getitem" and op(up) == "getitem" and gate.args[0] is up.args[0]:
        return False, same(gate.args[0].args[0])  # type: ignore[union-attr]
    in_turns = all(op(n).startswith("slice") and len(n.args) == 5 and n.args[4] == 2 for n in (gate, up))
    if in_turns and same(gate.args[0]) is same(up.args[0]) and (gate.args[2], up.args[2]) == (0, 1):
        return True, same(gate.args[0])
    return False, None


@dataclass(frozen=True)
class Chosen:
    """A batched product with the weights of each row's expert, and with its bias."""

    rows: Node
    weight: Node
    ids: Node
    bias: Node | None
    transposed: bool


def _chosen(node: Any) -> Chosen | None:
    """`bmm(weight[ids], rows)` or, with weights stored `[in, out]`, `bmm(rows, weight[ids])`; `+ bias[ids]`."""
    node, bias = unview(node), None
    if op(node).startswith(("add.Tensor", "add_.Tensor")):
        taken = same(node.args[1])
        if not op(taken).startswith("index.Tensor"):
            return None
        node, bias = unview(node.args[0]), same(taken.args[0])
    if isinstance(node, Node) and "grouped_mm" in str(node.target):
        return _grouped(node, bias)
    if not op(node).startswith("bmm"):
        return None
    for at in (0, 1):
        weight = same(node.args[at])
        if op(weight).startswith("index.Tensor") and parameter(same(weight.args[0])):
            return Chosen(node.args[1 - at], same(weight.args[0]), weight.args[1][0], bias, at == 1)
    return None


def _order(node: Any) -> Any:
    """The permutation that a node undoes: `x[inverse]`, the inverse written by index or found by sorting."""
    if not op(node).startswith("index.Tensor") or len(node.args[1]) != 1:
        return None
    inverse = same(node.args[1][0])
    if op(inverse).startswith("index_put"):
        return same(inverse.args[1][0]) if op(same(inverse.args[2])).startswith("arange") else None
    sort = inverse.args[0] if op(inverse) == "getitem" and inverse.args[1] == 1 else inverse
    return same(sort.args[0]) if op(sort).startswith(("sort", "argsort")) else None


def _grouped(node: Node, bias: Node | None) -> Chosen | None:
    """`grouped_mm(rows, weight, offsets)`, the offsets being running sums of how many rows each expert has."""
    rows, right, *rest = node.args
    given: Any = rest[0] if rest else node.kwargs.get("offs")
    counts = same(given)
    if not op(counts).startswith("cumsum") or not op(same(counts.args[0])).startswith(("histc", "bincount")):
        return None
    ids = same(same(counts.args[0]).args[0])
    if op(ids) != "getitem" or ids.args[1] != 0 or not op(ids.args[0]).startswith("sort"):
        return None
    right = same(right)
    turned = op(right).startswith("transpose") and parameter(same(right.args[0]))
    weight: Any = same(right.args[0]) if turned else right
    if not parameter(weight):
        return None
    chosen: Any = ids.args[0].args[0]
    return Chosen(rows, weight, chosen, bias, not turned)  # type: ignore[arg-type]


def sparsemixer(ids: Any, weights: Any) -> Gate | None:
    """The gate that chooses one expert after the other (Liu et al. 2024, arXiv 2409.12136, at inference).

    Each choice is the greatest logit, the second without the first; its weight a softmax over those near it.
    """
    chosen, scores = (same(n) for n in (ids, weights))
    joined = all(op(n).startswith(("cat", "concat")) for n in (chosen, scores))
    if not joined or len(chosen.args[0]) != 2:
        return None
    first, second = (same(n) for n in chosen.args[0])
    logits = _greatest(first)
    without = _greatest(second)
    apart = op(without).startswith("scatter") and same(without.args[0]) is logits and same(without.args[2]) is first
    if not op(logits).startswith("linear") or not apart or without.args[3] != float("-inf"):
        return None
    jitters = [_near(same(w), logits if i == 0 else without, (first, second)[i]) for i, w in enumerate(scores.args[0])]
    if None in jitters or jitters[0] != jitters[1]:
        return None
    attrs = {"score": "sparsemixer", "groups": 1, "top_groups": 1, "group_score": "top2", "top_k": 2}
    return Gate(logits.args[0], logits.args[1], None, attrs | {"normalise": False, "scale": 1.0, "jitter": jitters[0]})


def _greatest(index: Any) -> Any:
    """What a node is the place of the greatest element of."""
    found = op(index) == "getitem" and index.args[1] == 1 and op(index.args[0]).startswith("max.dim")
    return same(index.args[0].args[0]) if found else None


def _near(weight: Any, logits: Any, index: Any) -> float | None:
    """The jitter of `gather(softmax(logits without those further off than 2 jitters), index)`."""
    soft: Any = same(weight.args[0]) if op(weight).startswith("gather") and same(weight.args[2]) is index else None
    masked: Any = same(soft.args[0]) if op(soft).startswith("softmax") else None
    if not op(masked).startswith("masked_fill") or same(masked.args[0]) is not logits:
        return None
    beyond = same(masked.args[1])
    return float(beyond.args[1]) / 2 if op(beyond).startswith("gt.Scalar") else None
