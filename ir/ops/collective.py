"""Communication between the ranks of a mesh axis: collectives, stage-to-stage transfers, dispatch and combine.

Types are those of one rank. Every op names its axis (`mesh.Mesh`) and the number of ranks in a group along it.
`bytes_sent` counts what one rank sends, as the usual ring or pairwise algorithms do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.dims import Size, ceildiv, dim
from moec.ir.mesh import AXES, part
from moec.ir.module import Module
from moec.ir.ops.core import FLOATS, OUT
from moec.ir.optable import INT, STR, Attr, Attrs, OpDef, TypeRuleError, index, known, require, same, tensor
from moec.ir.types import QUANTISED, TensorType, Type

AXIS = Attr("str", choices=AXES)
GROUP = {"axis": AXIS, "ranks": INT}


def _ranks(a: Attrs) -> int:
    require(int(a["ranks"]) >= 1, f"ranks must be at least 1, got {a['ranks']}")
    return int(a["ranks"])


def _group(a: Attrs, ctx: Any) -> Any:
    """The ranks along the op's axis; raises ValueError when the mesh says another number."""
    group = ctx.group(str(a["axis"]))
    if group.size != int(a["ranks"]):
        raise ValueError(f"the mesh has {group.size} ranks on axis {a['axis']}, the op was built for {a['ranks']}")
    return group


class AllReduce(OpDef):
    """The sum of `x` over the ranks of an axis, on every one of them."""

    name = "comm.all_reduce"
    operands = "x"
    attrs = GROUP

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        _ranks(a)
        return [tensor(t[0], "x", dtypes=FLOATS)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [sum(_group(a, ctx).exchange(x[0]))]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements()

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return ceildiv(tensor(t[0], "x").nbytes() * 2 * (_ranks(a) - 1), _ranks(a))


class AllGather(OpDef):
    """The parts of all ranks of an axis joined along `dim`, on every one; `rows` names the sum of uneven rows."""

    name = "comm.all_gather"
    operands = "x"
    attrs = {**GROUP, "dim": INT, "rows": Attr("str", optional=True)}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, at = tensor(t[0], "x"), int(a["dim"])
        require(0 <= at < len(x.shape), f"dim {at} is out of range for {x}")
        require("rows" not in a or at == 0, "rows names the size of dim 0")
        size = dim(str(a["rows"])) if "rows" in a else x.shape[at] * _ranks(a)
        return [TensorType(x.dtype, (*x.shape[:at], size, *x.shape[at + 1 :]), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [ctx.torch.cat(_group(a, ctx).exchange(x[0]), int(a["dim"]))]

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").nbytes() * (_ranks(a) - 1)


class ReduceScatter(OpDef):
    """The sum of `x` over the ranks of an axis, of which rank i keeps the i-th part of the rows, `rows` in number."""

    name = "comm.reduce_scatter"
    operands = "x"
    attrs = {**GROUP, "rows": STR}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        _ranks(a)
        x = tensor(t[0], "x", dtypes=FLOATS)
        return [TensorType(x.dtype, (dim(str(a["rows"])), *x.shape[1:]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        group = _group(a, ctx)
        first, stop = part(x[0].shape[0], group.size, group.index)
        return [sum(group.exchange(x[0]))[first:stop]]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").elements()

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return ceildiv(tensor(t[0], "x").nbytes() * (_ranks(a) - 1), _ranks(a))


class AllToAll(OpDef):
    """Cut `x` along `split` into one part a rank, send each its part, join what comes along `join`."""

    name = "comm.all_to_all"
    operands = "x"
    attrs = {**GROUP, "split": INT, "join": INT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, n = tensor(t[0], "x"), _ranks(a)
        cut, join = int(a["split"]), int(a["join"])
        require(max(cut, join) < len(x.shape) and min(cut, join) >= 0, f"split {cut} or join {join} leaves {x}")
        size = known(x.shape[cut], "size of the dim that is split")
        require(size % n == 0, f"{size} does not divide over {n} ranks")
        shape = list(x.shape)
        shape[cut] = size // n
        shape[join] = shape[join] * n
        return [TensorType(x.dtype, tuple(shape), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        group = _group(a, ctx)
        parts = group.exchange(x[0].chunk(group.size, int(a["split"])))
        return [ctx.torch.cat([p[group.index] for p in parts], int(a["join"]))]

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return ceildiv(tensor(t[0], "x").nbytes() * (_ranks(a) - 1), _ranks(a))


class Rows(OpDef):
    """This rank's part of the rows of a tensor that all ranks of an axis hold, `rows` in number. Sends nothing.

    Rank i takes the rows `i · c .. (i + 1) · c` with `c = ceil(T / ranks)`, cut off at T.
    """

    name = "comm.rows"
    operands = "x"
    attrs = {**GROUP, "rows": STR}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        _ranks(a)
        x = tensor(t[0], "x")
        return [TensorType(x.dtype, (dim(str(a["rows"])), *x.shape[1:]), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        group = _group(a, ctx)
        first, stop = part(x[0].shape[0], group.size, group.index)
        return [x[0][first:stop]]

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(r[0], "y").nbytes()


class Send(OpDef):
    """Send `x` to the rank at place `to` of an axis, which receives it with a `comm.recv`."""

    name = "comm.send"
    operands = "x"
    attrs = {**GROUP, "to": INT}
    results = ""
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        require(0 <= int(a["to"]) < _ranks(a), f"to {a['to']} leaves 0..{a['ranks']}")
        tensor(t[0], "x")
        return []

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        _group(a, ctx).send(int(a["to"]), x[0])
        return []

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[0], "x").nbytes()


class Recv(OpDef):
    """Receive a tensor from the rank at place `source` of an axis; `carries` says whether a recipe may change its type.

    `rows` is its first dim, `width` its second.
    """

    name = "comm.recv"
    attrs = {
        **GROUP,
        "source": INT,
        "dtype": Attr("str", choices=FLOATS),
        "rows": STR,
        "width": INT,
        "carries": Attr("str", choices=("activations", "logits")),
    }
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        require(0 <= int(a["source"]) < _ranks(a), f"source {a['source']} leaves 0..{a['ranks']}")
        return [TensorType(str(a["dtype"]), (dim(str(a["rows"])), int(a["width"])))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [_group(a, ctx).receive(int(a["source"]))]


VIA = Attr("str", choices=("direct", "node"))
EXPERTS = {**GROUP, "slots": INT, "rows": STR, "via": VIA, "per_node": INT}
"""`via = direct`: one row for each token-expert pair. `node`: one for each token and node, to the rank there that has
the sender's place on its node, which forwards it over the node's own links (DeepSeek-V3, arXiv 2412.19437, sec. 3.2.2).
"""


def _expert_ranks(a: Attrs) -> int:
    n, slots, node = _ranks(a), int(a["slots"]), int(a["per_node"])
    require(slots >= n and slots % n == 0, f"{slots} expert slots do not divide over {n} ranks")
    require(node >= 1 and (node >= n or n % node == 0), f"{n} ranks do not divide over nodes of {node}")
    return n


def _sent_rows(tokens: Size, k: int, a: Attrs) -> Size:
    """Most rows that one rank sends to others, when every expert is as likely."""
    n, node = _expert_ranks(a), int(a["per_node"])
    if a["via"] == "direct" or node >= n:
        return ceildiv(tokens * k * (n - 1), n)
    nodes = n // node
    reach = min(k, nodes, int(a.get("node_limit", nodes)))
    return ceildiv(tokens * reach * (nodes - 1), nodes) + ceildiv(tokens * k * (node - 1), node)


class Dispatch(OpDef):
    """Send every token to the ranks that hold its experts; what arrives is sorted by the slots of this rank.

    `layer` chooses the layer's row of the placement (module attribute `placement`, from layer `first` on; without one,
    slot s holds expert s mod `experts`), `ids[T, k]` the experts, and `Replicas.choose` the copy where an expert has
    several. Gives `x` rows `[D, H]`, where slot s owns rows `offsets[s]..offsets[s+1]`, `rows` names D, a number anew
    with every dispatch, and a handle by which `comm.combine` sends results back. Weights travel where nodes sum on the
    way back (`via = node`).
    """

    name = "comm.dispatch"
    operands = "layer x ids weights"
    attrs = {**EXPERTS, "experts": INT, "first": INT, "node_limit": Attr("int", optional=True)}
    results = "rows offsets handle"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        index(t[0])
        x, ids, weights = tensor(t[1], "x", 2), tensor(t[2], "ids", 2, ("i32",)), tensor(t[3], "weights", 2)
        same(x.shape[0], ids.shape[0], "tokens of x and ids")
        require(ids.shape == weights.shape, f"ids and weights differ: {ids} and {weights}")
        n, slots, experts = _expert_ranks(a), int(a["slots"]), int(a["experts"])
        require(1 <= experts <= slots, f"{experts} experts need at least as many slots, got {slots}")
        if x.quant is not None and x.quant.block[0] != 1:
            raise TypeRuleError(f"rows that travel alone need scales of their own, got {x}")
        rows = TensorType(x.dtype, (dim(str(a["rows"])), x.shape[1]), x.quant)
        return [rows, TensorType("i32", (slots // n + 1,)), TensorType("i32", (n,))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch, (layer, rows, ids, _) = ctx.torch, x
        group, local = _group(a, ctx), int(a["slots"]) // int(a["ranks"])
        replicas = ctx.replicas(int(layer) - int(a["first"]), int(a["experts"]), int(a["slots"]))
        slots = torch.from_numpy(replicas.choose(ids.numpy(), group.index)).flatten()
        order = slots.argsort(stable=True)
        to = slots[order] // local
        sent = [(rows[order[to == r] // ids.shape[1]], slots[order[to == r]] % local) for r in range(group.size)]
        got = [parts[group.index] for parts in group.exchange(sent)]
        arrived, slot = torch.cat([g[0] for g in got]), torch.cat([g[1] for g in got])
        by_slot = slot.argsort(stable=True)
        offsets = torch.cat((slot.new_zeros(1), torch.bincount(slot, minlength=local).cumsum(0)))
        handle = (order, by_slot, [len(g[1]) for g in got])
        return [arrived[by_slot], offsets.int(), handle]

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        x, ids = tensor(t[1], "x"), tensor(t[2], "ids")
        k = known(ids.shape[1], "experts of a token")
        return _sent_rows(ids.shape[0], k, a) * TensorType(x.dtype, (1, x.shape[1]), x.quant).nbytes()


class Combine(OpDef):
    """Send the experts' results back to where the tokens came from: `y[t] = Σ_j weights[t, j] · result of pair (t, j)`.

    `handle` is that of the dispatch, whose placement attributes it repeats.
    """

    name = "comm.combine"
    operands = "rows handle weights"
    attrs = {**EXPERTS, "node_limit": Attr("int", optional=True), "out": OUT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        rows, handle = tensor(t[0], "rows", 2, (*FLOATS, *QUANTISED)), tensor(t[1], "handle", 1, ("i32",))
        weights = tensor(t[2], "weights", 2)
        same(handle.shape[0], _expert_ranks(a), "ranks of the handle and of the axis")
        same(rows.shape[0], dim(str(a["rows"])), "rows and their name")
        if rows.quant is not None and rows.quant.block[0] != 1:
            raise TypeRuleError(f"rows that travel alone need scales of their own, got {rows}")
        dtype = str(a.get("out", "bf16" if rows.quant else rows.dtype))
        return [TensorType(dtype, (weights.shape[0], rows.shape[1]))]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        torch, (rows, (order, by_slot, counts), weights) = ctx.torch, x
        group = _group(a, ctx)
        arrived = torch.empty_like(rows)
        arrived[by_slot] = rows
        back = [parts[group.index] for parts in group.exchange(arrived.split(counts))]
        pairs = rows.new_empty(weights.numel(), rows.shape[1])
        pairs[order] = torch.cat(back)
        return [(pairs.unflatten(0, weights.shape) * weights[..., None]).sum(1)]

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(t[2], "weights").elements() * tensor(t[0], "rows").shape[1] * 2

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        rows, weights = tensor(t[0], "rows"), tensor(t[2], "weights")
        k = known(weights.shape[1], "experts of a token")
        return _sent_rows(weights.shape[0], k, a) * TensorType(rows.dtype, (1, rows.shape[1]), rows.quant).nbytes()
