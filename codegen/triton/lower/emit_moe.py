"""Launches of the router, the dispatch and the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import tensor_of, width
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.products import Bias, Product, Store, SwiGlu
from moec.codegen.triton.fused.products import Step as TileStep
from moec.codegen.triton.lower.launching import launch_product, typed
from moec.codegen.triton.lower.places import Place
from moec.codegen.triton.spec import kernel
from moec.codegen.triton.specs.routing import router
from moec.ir import Op, TensorType, Value, WeightRef
from moec.ir.types import BITS, SCALE_BITS

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering


def route(low: Lowering, group: Group) -> None:
    """The gate's product, then scores and choice; the tokens of every expert are counted for the dispatch."""
    op = group.anchor
    x, gate = op.operands[:2]
    assert isinstance(x, Value)
    experts, tokens = int(tensor_of(gate).shape[0]), str(tensor_of(x).shape[0])  # type: ignore[arg-type]
    logits = Value("logits", TensorType("f32", (tensor_of(x).shape[0], experts)))
    low.env[logits] = low.temporary(tokens, experts, 4)
    bias = op.operands[2] if len(op.operands) == 3 else None
    steps: tuple[TileStep, ...] = (Store(logits),)
    if bias is not None and op.attrs.get("bias_to") == "logits":
        steps, bias = (Bias(bias), *steps), None
    launch_product(low, group, Product(x, gate, "dense", steps), tokens)
    count = Place(low.slot(experts * 4), 0, experts, experts, 4)
    low.extra["count", op.results[0]] = count
    low.later(low.step({"fill": None, "bytes": str(experts * 4)}), "fill", count)
    attrs, top_k = op.attrs, int(op.attrs["top_k"])  # type: ignore[arg-type]
    if attrs["score"] == "sparsemixer":
        spec, dims = kernel("route_sparsemixer"), {"NORMALISE": int(bool(attrs["normalise"]))}
    else:
        spec = router(
            softmax=attrs["score"] == "softmax", bias=bias is not None, pairs=attrs["group_score"] == "top2",
            normalise=bool(attrs["normalise"]),
        )  # fmt: skip
        dims = {"NG": int(attrs["groups"]), "TOP_GROUPS": int(attrs["top_groups"])}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {
        "logit_ptr": low.place(logits), "index_ptr": low.place(op.results[0]), "weight_ptr": low.place(op.results[1]),
        "count_ptr": count, "T": tokens, "route_scale": attrs["scale"],
    }  # fmt: skip
    instance = low.phase.table.instance(spec, "any", E=experts, TOP_K=top_k, **dims)
    if attrs["score"] == "sparsemixer":
        arguments["jitter"] = attrs["jitter"]
    if bias is not None:
        arguments["bias_ptr"] = low.place(bias)
        instance = typed(instance, bias_ptr=bias)
    low.launch(instance, group, arguments, {"T": tokens})


def padded_rows(low: Lowering, tokens: str, top_k: int, experts: int) -> str:
    """Rows sorted by expert, each expert's share padded to whole blocks: the most that there can be."""
    pairs, align = f"({tokens}) * {top_k}", low.phase.align
    return f"ceildiv({pairs} + min({experts}, {pairs}) * {align - 1}, {align}) * {align}"


def dispatch(low: Lowering, group: Group) -> None:
    """Where every row comes from; the rows themselves are fetched by the experts' kernel."""
    op = group.anchor
    x, ids = op.operands
    assert isinstance(x, Value) and isinstance(ids, Value)
    if ("count", ids) not in low.extra:
        raise NoKernel(op=op.name, reason=f"%{ids.name} is not made by moe.route in this function")
    rows_, offsets, order = op.results
    wanted = {o.name for o in low.uses.get(rows_, [])} | {o.name for o in low.uses.get(offsets, [])}
    if others := wanted - {"moe.experts", "moe.weigh"}:
        raise NoKernel(op=op.name, reason=f"its rows are read by {', '.join(sorted(others))}")
    experts, top_k = int(op.attrs["experts"]), width(ids)  # type: ignore[arg-type]
    tokens, align = str(tensor_of(x).shape[0]), low.phase.align
    total = padded_rows(low, tokens, top_k, experts)
    most = low.phase.most(total)
    low.extra["source", rows_] = Place(low.slot(most * 4), 0, 1, 1, 4)
    low.extra["blocks", rows_] = Place(low.slot(most // align * 4), 0, 1, 1, 4)
    low.env[rows_] = low.place(x)
    if tensor_of(x).quant is not None:
        low.scales[rows_] = low.scale(x)
    spec = kernel("permutation_contiguous")
    instance = low.phase.table.instance(spec, "any", E=experts, TOP_K=top_k, ALIGN=align)
    low.launch(instance, group, {
        "index_ptr": low.place(ids), "count_ptr": low.extra["count", ids], "slot_ptr": low.place(order),
        "source_ptr": low.extra["source", rows_], "block_expert_ptr": low.extra["blocks", rows_],
        "PAIRS": f"({tokens}) * {top_k}", "ROWS": total, "capacity": 0,
    }, {})  # fmt: skip


def dispatched(low: Lowering, op: Op, rows_: Value) -> tuple[str, Op]:
    """How many sorted rows there are with their padding, and the dispatch that sorted them. Raises NoKernel."""
    producer = low.function.producer()
    made = producer.get(rows_)
    while made is not None and made.name in ("moe.weigh", "quant.cast"):
        made = producer.get(made.operands[0])  # type: ignore[arg-type]
    if made is not None and made.name == "comm.dispatch":
        local = int(made.attrs["slots"]) // int(made.attrs["ranks"])  # type: ignore[arg-type]
        return padded_rows(low, str(made.attrs["rows"]), 1, local), made
    if made is None or made.name != "moe.dispatch":
        raise NoKernel(op=op.name, reason=f"%{rows_.name} is not made by a dispatch in this function")
    x, ids = made.operands
    return padded_rows(low, str(tensor_of(x).shape[0]), width(ids), int(made.attrs["experts"])), made  # type: ignore[arg-type]


def weighed(low: Lowering, group: Group, op: Op) -> None:
    """Places for weighed rows, which lie where the dispatch wants them, with gaps between the experts."""
    rows_ = op.operands[0]
    assert isinstance(rows_, Value)
    total, _ = dispatched(low, op, rows_)
    most = low.phase.most(total)
    for value in group.outputs(low.function):
        t, columns = tensor_of(value), width(value)
        low.env[value] = low.temporary(total, columns, BITS[t.dtype] // 8)
        if t.quant is not None:
            groups = -(-columns // t.quant.block[-1])
            size = SCALE_BITS[t.quant.scale] // 8
            low.scales[value] = Place(low.slot(most * groups * size), 0, groups, groups, size)
        low.extra["blocks", value] = low.extra["blocks", rows_]


def experts(low: Lowering, group: Group) -> None:
    """Gate and up projection with SwiGLU (and quantisation), then the down projection, over blocks of sorted rows."""
    op = group.anchor
    rows_, _, gate_up, down, *biases = op.operands
    assert isinstance(rows_, Value) and isinstance(gate_up, WeightRef)
    total, made = dispatched(low, op, rows_)
    t = tensor_of(rows_)
    inner = int(tensor_of(gate_up).shape[-2]) // 2  # type: ignore[arg-type]
    most = low.phase.most(total)
    hidden = Value("hidden", TensorType(t.dtype, (most, inner), t.quant))
    low.extra["blocks", hidden] = low.extra["blocks", rows_]
    low.env[hidden] = low.temporary(total, inner, BITS[t.dtype] // 8)
    if t.quant is not None:
        groups = -(-inner // 128)
        size = 4 if t.quant.scale == "f32" else 1
        low.scales[hidden] = Place(low.slot(most * groups * size), 0, groups, groups, size)
    result = op.result
    columns, itemsize = width(result), BITS[tensor_of(result).dtype] // 8
    low.env[result] = Place(low.slot(most * columns * itemsize), 0, columns, columns, itemsize)
    align = low.phase.align
    added: list[tuple[Bias, ...]] = [(Bias(b),) for b in biases] or [(), ()]
    steps: tuple[TileStep, ...] = (*added[0], SwiGlu.of(op.attrs), Store(hidden))
    up = Product(rows_, gate_up, "grouped", steps, gathered=rows_ in made.results)
    launch_product(low, group, up, total, ALIGN=align)
    launch_product(low, group, Product(hidden, down, "grouped", (*added[1], Store(result))), total, ALIGN=align)
