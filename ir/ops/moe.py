"""Mixture of experts: routing, dispatch, products, combine. An expert is a dimension, never an op of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Dim, Size, ceildiv
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS, GLU, OUT, check_glu, product_dtype, swiglu
from moec.ir.optable import BOOL, FLOAT, INT, Attr, Attrs, OpDef, known, require, same, tensor
from moec.ir.types import QUANTISED, TensorType, Type


class MoeRoute(OpDef):
    """Choose experts by `score(x · gateᵀ)` in FP32, group-limited top-k (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2).

    The bias steers the choice only (`bias_to = choice`, the default) or is part of the product (`logits`); the weights
    are the chosen scores, normalised when `normalise`, times `scale`. A group's rank is the sum of its two best
    (`group_score = top2`) or its best score (`max`). On equal scores the lower expert comes first.

    `score = sparsemixer` (Liu et al. 2024, 2409.12136, at inference) chooses one expert after the other: the weight of
    each is its softmax among those not chosen before whose logit is within `2·jitter`, relatively, of the best.
    """

    name = "moe.route"
    operands = "x gate bias?"
    attrs = {
        "score": Attr("str", choices=("sigmoid", "softmax", "sparsemixer")),
        "groups": INT,
        "top_groups": INT,
        "group_score": Attr("str", choices=("top2", "max")),
        "top_k": INT,
        "normalise": BOOL,
        "scale": FLOAT,
        "bias_to": Attr("str", optional=True, choices=("choice", "logits")),
        "jitter": Attr("float", optional=True),
    }
    results = "ids weights"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, gate = tensor(t[0], "x", 2), tensor(t[1], "gate", 2)
        same(x.shape[1], gate.shape[1], "inner dims of x and gate")
        experts = known(gate.shape[0], "number of experts")
        if len(t) == 3:
            same(tensor(t[2], "bias", 1).shape[0], experts, "bias and experts")
        k, groups, chosen = int(a["top_k"]), int(a["groups"]), int(a["top_groups"])
        require(groups >= 1 and experts % groups == 0, f"{experts} experts do not divide into {groups} groups")
        require(1 <= chosen <= groups, f"top_groups {chosen} must lie in 1..{groups}")
        reach = chosen * (experts // groups)
        require(1 <= k <= reach, f"top_k {k} must lie in 1..{reach} (experts of the chosen groups)")
        if a["score"] == "sparsemixer":
            require(
                groups == 1 and len(t) == 2 and "jitter" in a, "sparsemixer takes no groups and no bias, but a jitter"
            )
        tokens = x.shape[0]
        return [TensorType("i32", (tokens, k)), TensorType("f32", (tokens, k))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        logits = x[0] @ x[1].T
        to_logits = a.get("bias_to") == "logits"
        logits = logits + x[2] if len(x) == 3 and to_logits else logits
        if a["score"] == "sparsemixer":
            ids, weights = _sparsemixer(logits, int(a["top_k"]), a["jitter"], torch)
            return [ids.int(), _weigh(weights, a)]
        scores = logits.sigmoid() if a["score"] == "sigmoid" else logits.softmax(-1)
        choice = scores + x[2] if len(x) == 3 and not to_logits else scores
        groups, chosen, k = int(a["groups"]), int(a["top_groups"]), int(a["top_k"])
        if chosen < groups:
            by_group = choice.unflatten(-1, (groups, -1))
            depth = 2 if a["group_score"] == "top2" else 1
            rank = by_group.sort(dim=-1, descending=True, stable=True).values[..., :depth].sum(-1)
            best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :chosen]
            mask = torch.zeros_like(rank).scatter_(-1, best, 1.0).bool()
            choice = by_group.masked_fill(~mask[..., None], float("-inf")).flatten(-2)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return [ids.int(), _weigh(scores.gather(-1, ids), a)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements() * tensor(t[1], "gate").shape[0] * 2


def _weigh(weights: Any, a: Attrs) -> Any:
    if a["normalise"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * a["scale"]


def _sparsemixer(logits: Any, top_k: int, jitter: Any, torch: Any) -> tuple[Any, Any]:
    """Ids and weights [T, top_k], chosen one after the other."""
    left, ids, weights = logits, [], []
    for _ in range(top_k):
        best, chosen = left.max(-1, keepdim=True)
        near = (best - logits) / logits.abs().clamp(min=best) <= 2 * jitter
        weights.append(left.masked_fill(~near, float("-inf")).softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, float("-inf"))
    return torch.cat(ids, -1), torch.cat(weights, -1)


class MoeDispatch(OpDef):
    """Sort token-expert pairs by expert: `rows[order[t, j]] = x[t]`; expert e owns rows `offsets[e]..offsets[e+1]`."""

    name = "moe.dispatch"
    operands = "x ids"
    attrs = {"experts": INT}
    takes_quantised = True
    results = "rows offsets order"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, ids = tensor(t[0], "x", 2), tensor(t[1], "ids", 2, ("i32",))
        same(x.shape[0], ids.shape[0], "tokens of x and ids")
        require(int(a["experts"]) >= 1, f"experts must be at least 1, got {a['experts']}")
        tokens, k = ids.shape
        rows = TensorType(x.dtype, (tokens * k, x.shape[1]), x.quant)
        return [rows, TensorType("i32", (int(a["experts"]) + 1,)), TensorType("i32", ids.shape)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch = ctx.torch
        flat = x[1].flatten().long()
        by_expert = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=int(a["experts"]))
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        order = torch.empty_like(by_expert)
        order[by_expert] = torch.arange(len(flat))
        source = by_expert // x[1].shape[1]
        rows = x[0][source] if isinstance(x[0], torch.Tensor) else x[0].rows(source)
        return [rows, offsets.int(), order.reshape(x[1].shape).int()]


class MoeWeigh(OpDef):
    """Sorted rows times their weights, for models that weigh an expert's input: `y[order[t, j]] *= weights[t, j]`."""

    name = "moe.weigh"
    operands = "rows order weights"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        rows, order, weights = tensor(t[0], "rows", 2, FLOATS), tensor(t[1], "order", 2), tensor(t[2], "weights", 2)
        require(order.shape == weights.shape, f"order and weights differ: {order} and {weights}")
        same(rows.shape[0], order.shape[0] * order.shape[1], "rows and tokens * top_k")
        return [rows]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        factor = x[2].new_zeros(len(x[0]))
        factor[x[1].flatten().long()] = x[2].flatten()
        return [x[0] * factor[:, None]]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "rows").elements()


class MoeExperts(OpDef):
    """The experts' feed-forward on sorted rows: `down[e] · swiglu(gate_up[e] · x)` for the rows of each expert e.

    With biases `gate_up_bias[e]` and `down_bias[e]` are added to the two products. Attributes as of `swiglu`. Quantised
    rows make both products quantised: the inner activation is quantised as the rows are.
    """

    name = "moe.experts"
    operands = "rows offsets gate_up down gate_up_bias? down_bias?"
    attrs = {"out": OUT, **GLU}
    takes_quantised = True

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        rows, offsets = tensor(t[0], "rows", 2), tensor(t[1], "offsets", 1, ("i32",))
        up, down = tensor(t[2], "gate_up", 3), tensor(t[3], "down", 3)
        same(offsets.shape[0], up.shape[0] + 1, "offsets and experts + 1")
        same(up.shape[0], down.shape[0], "experts of gate_up and down")
        same(rows.shape[1], up.shape[2], "inner dims of rows and gate_up")
        same(up.shape[1], down.shape[2] * 2, "gate_up rows and twice the inner dim of down")
        require(len(t) != 5, "moe.experts takes both biases or none")
        for bias, w, what in zip(t[4:], (up, down), ("gate_up", "down"), strict=False):
            shape = tensor(bias, f"{what}_bias", 2).shape
            require(shape == w.shape[:2], f"{what}_bias has dims {list(shape)}, {what} has {list(w.shape[:2])} rows")
        check_glu(a)
        return [TensorType(product_dtype(rows, up, a), (rows.shape[0], down.shape[1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        rows, offsets, up, down, *biases = x
        inner = swiglu(_by_expert(rows, offsets, up, ctx, *biases[:1]), ctx.torch, a)
        if not isinstance(rows, ctx.torch.Tensor):
            inner = rows.like(inner)
        return [_by_expert(inner, offsets, down, ctx, *biases[1:])]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        rows, down = tensor(t[0], "rows"), tensor(t[3], "down")
        return rows.shape[0] * rows.shape[1] * down.shape[2] * 6

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        """Rows, and the weights of as many experts as rows can reach."""
        rows, up, down = tensor(t[0], "rows"), tensor(t[2], "gate_up"), tensor(t[3], "down")
        experts, n = up.shape[0], rows.shape[0]
        active = (_min(n, experts)) if isinstance(n, Dim) else min(n, known(experts, "experts"))
        return rows.nbytes() + ceildiv((up.nbytes() + down.nbytes()) * active, experts)


def _by_expert(rows: Any, offsets: Any, weights: Any, ctx: Any, bias: Any = None) -> Any:
    """Rows of each expert times its weight `[experts, out, in]`, plus its `bias[experts, out]`."""
    out = weights.new_zeros(rows.shape[0], weights.shape[1])
    for e in range(weights.shape[0]):
        part = slice(int(offsets[e]), int(offsets[e + 1]))
        out[part] = ctx.product(rows[part] if isinstance(rows, ctx.torch.Tensor) else rows.rows(part), weights[e])
        if bias is not None:
            out[part] += bias[e]
    return out


def _min(a: Size, b: Size) -> Size:
    from moec.ir.dims import parse_dim

    return parse_dim(f"min({a}, {b})")


class MoeCombine(OpDef):
    """Sum of each token's expert outputs: `y[t] = Σ_j weights[t, j] · rows[order[t, j]]`, all of weight 1 without."""

    name = "moe.combine"
    operands = "rows order weights?"
    attrs = {"out": OUT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        rows, order = tensor(t[0], "rows", 2, (*FLOATS, *QUANTISED)), tensor(t[1], "order", 2)
        if len(t) == 3:
            weights = tensor(t[2], "weights", 2)
            require(order.shape == weights.shape, f"order and weights differ: {order} and {weights}")
        same(rows.shape[0], order.shape[0] * order.shape[1], "rows and tokens * top_k")
        dtype = str(a.get("out", "bf16" if rows.quant else rows.dtype))
        return [TensorType(dtype, (order.shape[0], rows.shape[1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        rows = x[0][x[1].long()]
        return [(rows * x[2][..., None] if len(x) == 3 else rows).sum(1)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "rows").elements() * 2
