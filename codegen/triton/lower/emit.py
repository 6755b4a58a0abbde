"""One handler for each kind of group: which kernels it takes and what they are given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.arch import architecture
from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import Generated, cache_of, pointer, tensor_of, width
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.products import Add, Bias, Product, Store, SwiGlu, product_kernel
from moec.codegen.triton.fused.products import Step as TileStep
from moec.codegen.triton.fused.rows import rows_kernel
from moec.codegen.triton.lower.places import Base, Place, Step
from moec.codegen.triton.spec import Instance, kernel
from moec.codegen.triton.specs.recipe import power_of_two
from moec.codegen.triton.specs.routing import router
from moec.ir import CacheType, Op, TensorType, Value, WeightRef
from moec.ir.expr import evaluate
from moec.ir.types import BITS

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering

MOST_SPLITS = 16


def emit(low: Lowering, group: Group) -> None:
    """Append the steps of a group. Raises NoKernel for an op that no kernel computes."""
    if group.rowwise:
        return rows(low, group)
    if group.anchor.name.startswith("comm."):
        raise NoKernel(
            op=group.anchor.name,
            reason="ranks exchange data in plans and on CPUs so far; --ranks 1 compiles one device",
        )
    handler = HANDLERS.get(group.anchor.name)
    if handler is None:
        raise NoKernel(op=group.anchor.name, reason="the GPU back end has none")
    handler(low, group)
    return None


def rows(low: Lowering, group: Group) -> None:
    """A chain of row-wise ops."""
    in_place = {
        op.result: op.operands[0]
        for op in group.ops
        if op.name == "rope" and isinstance(op.operands[0], Value) and low.rotates_in_place(op)
    }
    for op in group.ops:
        if op.name == "cache.append":
            low.layers[op.operands[0]] = op.operands[1]
    made = rows_kernel(group, low.function, "kernel", in_place)
    instance = low.phase.table.generated(made, low.phase.shape)
    low.launch(instance, group, bound(low, instance.signature, made), {"ROWS": made.rows})


def typed(instance: Instance, **arguments: Value | WeightRef) -> Instance:
    """The kernel with the element types that its arguments have here, where the declaration has others."""
    kinds = {n: pointer(v.type.dtype) for n, v in arguments.items() if isinstance(v.type, TensorType | CacheType)}
    other = {n: kind for n, kind in kinds.items() if instance.spec.signature[n] != kind}
    return replace(instance, types=other) if other else instance


def bound(low: Lowering, signature: Any, made: Generated) -> dict[str, Any]:
    """The arguments of a generated kernel."""
    values = {a.name: low.bind(a) for a in made.arguments}
    return {name: values[name] for name in signature}


def launch_product(low: Lowering, group: Group, product: Product, rows: str, **sizes: int) -> None:
    """A generated product."""
    if product.form == "widened" and not architecture(low.phase.table.arch).fp8:
        product = replace(product, raw=True)
    made = product_kernel(product, "kernel", group.ops, rows)
    instance = low.phase.table.generated(made, low.phase.shape, product, **sizes)
    low.launch(instance, group, bound(low, instance.signature, made), {"ROWS": rows})


def linear(low: Lowering, group: Group) -> None:
    """A linear layer and its epilogue."""
    anchor = group.anchor
    a, b = anchor.operands[:2]
    assert isinstance(a, Value)
    outputs = group.outputs(low.function)
    steps: list[TileStep] = [Bias(anchor.operands[2])] if len(anchor.operands) == 3 else []
    last: Value = anchor.result
    for op in group.ops:
        if op.name == "swiglu":
            steps.append(SwiGlu())
        elif op.name == "add":
            other = op.operands[1] if op.operands[0] is last else op.operands[0]
            assert isinstance(other, Value)
            steps.append(Add(other))
        last = op.result
        if op.result in outputs:
            steps.append(Store(op.result))
    launch_product(low, group, Product(a, b, "dense", tuple(steps)), str(tensor_of(a).shape[0]))


def linear_heads(low: Lowering, group: Group) -> None:
    """One product for each head."""
    op = group.anchor
    a, b = op.operands
    assert isinstance(a, Value)
    part: Any = op.attrs.get("part")
    part = None if part is None else tuple(part)
    product = Product(a, b, "heads", (Store(op.result),), part=part, transposed=bool(op.attrs.get("transposed")))
    launch_product(low, group, product, str(tensor_of(a).shape[0]))


def route(low: Lowering, group: Group) -> None:
    """The gate's product, then scores and choice; the tokens of every expert are counted for the dispatch."""
    op = group.anchor
    x, gate = op.operands[:2]
    assert isinstance(x, Value)
    experts, tokens = int(tensor_of(gate).shape[0]), str(tensor_of(x).shape[0])  # type: ignore[arg-type]
    logits = Value("logits", TensorType("f32", (tensor_of(x).shape[0], experts)))
    low.env[logits] = low.temporary(tokens, experts, 4)
    launch_product(low, group, Product(x, gate, "dense", (Store(logits),)), tokens)
    count = Place(low.slot(experts * 4), 0, experts, experts, 4)
    low.extra["count", op.results[0]] = count
    fill: Step = {"fill": None, "bytes": str(experts * 4)}
    low.steps.append(fill)
    low.later(fill, "fill", count)
    attrs = op.attrs
    spec = router(
        softmax=attrs["score"] == "softmax", bias=len(op.operands) == 3, pairs=attrs["group_score"] == "top2",
        normalise=bool(attrs["normalise"]),
    )  # fmt: skip
    dims = {
        "E": experts,
        "NG": int(attrs["groups"]),  # type: ignore[arg-type]
        "TOP_GROUPS": int(attrs["top_groups"]),  # type: ignore[arg-type]
        "TOP_K": int(attrs["top_k"]),  # type: ignore[arg-type]
    }
    arguments: dict[str, Any] = {
        "logit_ptr": low.place(logits), "index_ptr": low.place(op.results[0]), "weight_ptr": low.place(op.results[1]),
        "count_ptr": count, "T": tokens, "route_scale": attrs["scale"],
    }  # fmt: skip
    instance = low.phase.table.instance(spec, "any", **dims)
    if len(op.operands) == 3:
        arguments["bias_ptr"] = low.place(op.operands[2])
        instance = typed(instance, bias_ptr=op.operands[2])
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
    if wanted - {"moe.experts"}:
        raise NoKernel(op=op.name, reason=f"its rows are read by {', '.join(sorted(wanted - {'moe.experts'}))}")
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


def experts(low: Lowering, group: Group) -> None:
    """Gate and up projection with SwiGLU (and quantisation), then the down projection, over blocks of sorted rows."""
    op = group.anchor
    rows_, _, gate_up, down = op.operands
    assert isinstance(rows_, Value) and isinstance(gate_up, WeightRef)
    made = low.function.producer().get(rows_)
    if made is None or made.name != "moe.dispatch":
        raise NoKernel(op=op.name, reason=f"%{rows_.name} is not made by moe.dispatch in this function")
    x, ids = made.operands
    total = padded_rows(low, str(tensor_of(x).shape[0]), width(ids), int(made.attrs["experts"]))  # type: ignore[arg-type]
    t = tensor_of(rows_)
    inner = int(tensor_of(gate_up).shape[-2]) // 2  # type: ignore[arg-type]
    most = low.phase.most(total)
    hidden = Value("hidden", TensorType(t.dtype, (most, inner), t.quant))
    for what in ("source", "blocks"):
        low.extra[what, hidden] = low.extra[what, rows_]
    low.env[hidden] = low.temporary(total, inner, BITS[t.dtype] // 8)
    if t.quant is not None:
        groups = -(-inner // 128)
        size = 4 if t.quant.scale == "f32" else 1
        low.scales[hidden] = Place(low.slot(most * groups * size), 0, groups, groups, size)
    result = op.result
    columns, itemsize = width(result), BITS[tensor_of(result).dtype] // 8
    low.env[result] = Place(low.slot(most * columns * itemsize), 0, columns, columns, itemsize)
    align = low.phase.align
    up = Product(rows_, gate_up, "grouped", (SwiGlu(), Store(hidden)), gathered=True)
    launch_product(low, group, up, total, ALIGN=align)
    launch_product(low, group, Product(hidden, down, "grouped", (Store(result),)), total, ALIGN=align)


def cache_parts(low: Lowering, op: Op, cache: Value, rank: int) -> tuple[dict[str, Place], dict[str, int]]:
    """The cache's latent and rotary part, and the sizes that its kernels hold as constants."""
    t = cache_of(cache)
    if t.dtype not in ("bf16", "f32"):
        raise NoKernel(op=op.name, reason=f"the cache is {t.dtype}, GPU kernels read bf16")
    whole = low.cache(cache, op.operands[3 if op.name == "attn.mla_absorbed" else 1])  # type: ignore[arg-type]
    dims = {"DV": rank, "DR": int(t.shape[3]) - rank, "PAGE": int(t.shape[2])}  # type: ignore[arg-type]
    return {"latent_ptr": whole, "rope_ptr": whole.part(rank)}, dims


def cache_read(low: Lowering, group: Group) -> None:
    """All cached positions of every sequence in one piece."""
    op = group.anchor
    cache, _, pages, starts = op.operands
    assert isinstance(cache, Value) and isinstance(pages, Value)
    parts, dims = cache_parts(low, op, cache, int(op.attrs["rank"]))  # type: ignore[arg-type]
    instance = low.phase.table.instance(kernel("cache_read"), "any", **dims)
    latent, rope = op.results
    instance = typed(instance, latent_ptr=cache, rope_ptr=cache, latent_out_ptr=latent, rope_out_ptr=rope)
    low.launch(instance, group, {
        **parts, "pages_ptr": low.place(pages), "start_ptr": low.place(starts), "latent_out_ptr": low.place(latent),
        "rope_out_ptr": low.place(rope), "max_pages": str(tensor_of(pages).shape[1]),
    }, {"CONTEXT": "C", "B": "B"})  # fmt: skip


def attention(low: Lowering, group: Group) -> None:
    """Plain attention over expanded keys and values."""
    op = group.anchor
    q, kv, rope, _, _, starts = op.operands
    assert isinstance(q, Value)
    heads, columns = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    nope, v = int(op.attrs["nope"]), int(op.attrs["v"])  # type: ignore[arg-type]
    dims = {"HEADS": heads, "DN": nope, "DV": v, "DR": columns - nope}
    powers(op, dims)
    instance = low.phase.table.instance(kernel("mla_prefill"), "any", **dims)
    instance = typed(instance, q_ptr=q, kv_ptr=kv, rope_ptr=rope, out_ptr=op.result)
    low.launch(instance, group, {
        "q_ptr": low.place(q), "kv_ptr": low.place(kv), "rope_ptr": low.place(rope),
        "q_start_ptr": Place(Base("input", "q_starts"), 0, 1, 1, 4), "k_start_ptr": low.place(starts),
        "out_ptr": low.place(op.result), "q_row": low.place(q).row, "softmax_scale": op.attrs["scale"],
    }, {"CONTEXT": "ceildiv(T, B)", "B": "B"})  # fmt: skip


def absorbed(low: Lowering, group: Group) -> None:
    """Absorbed attention over the paged cache: shares of the keys in parallel, then their sum."""
    op = group.anchor
    q, rope, cache, _, _, _, pages = op.operands
    assert isinstance(q, Value) and isinstance(rope, Value) and isinstance(cache, Value) and isinstance(pages, Value)
    heads, rank = (int(d) for d in tensor_of(q).shape[1:])  # type: ignore[arg-type]
    parts, dims = cache_parts(low, op, cache, rank)
    dims["HEADS"] = heads
    powers(op, {"DV": rank, "DR": dims["DR"]})
    at, rope_at = low.place(q), low.place(rope)
    split = low.phase.table.instance(kernel("mla_decode_split"), "any", **dims)
    split = typed(split, q_ptr=q, q_rope_ptr=rope, latent_ptr=cache, rope_ptr=cache)
    rows_ = f"ceildiv(T, B) * {heads}"
    blocks = f"B * ceildiv({rows_}, {split.tile.constants['BH']})"
    # Enough programs to fill the device twice, at most as many as have keys to themselves.
    splits = f"max(1, min({MOST_SPLITS}, {2 * low.phase.sms} // ({blocks})))"
    most = most_shares(low, splits)
    partial = Place(low.slot(most * heads * rank * 4), 0, rank, rank, 4)
    lse = Place(low.slot(most * heads * 4), 0, 1, 1, 4)
    low.launch(split, group, {
        "q_ptr": at, "q_rope_ptr": rope_at, **parts, "pages_ptr": low.place(pages),
        "length_ptr": Place(Base("input", "lengths"), 0, 1, 1, 4), "partial_ptr": partial, "lse_ptr": lse,
        "q_row": at.row,
            "q_head": at.head, "q_rope_row": rope_at.row,
            "q_rope_head": rope_at.head, "softmax_scale": op.attrs["scale"],
        "max_pages": str(tensor_of(pages).shape[1]), "splits": splits, "QUERIES": "ceildiv(T, B)", "ROWS": rows_,
    }, {"B": "B", "QUERIES": "ceildiv(T, B)", "SPLITS": splits})  # fmt: skip
    combine = typed(low.phase.table.instance(kernel("mla_decode_combine"), "any", DV=rank), out_ptr=op.result)
    low.launch(combine, group, {
        "partial_ptr": partial, "lse_ptr": lse, "out_ptr": low.place(op.result), "splits": splits, "ROWS": rows_,
    }, {"B": "B", "ROWS": rows_})  # fmt: skip


def most_shares(low: Lowering, splits: str) -> int:
    """The most tokens times shares that any batch up to the limits makes."""
    bounds = low.phase.bounds
    batches = range(1, bounds["B"] + 1)
    tokens = [bounds["T"]] if bounds["B"] == 1 else batches
    return max(t * evaluate(splits, {"T": t, "B": min(t, bounds["B"])}) for t in tokens)


def powers(op: Op, dims: dict[str, int]) -> None:
    """Raise NoKernel unless the widths of a head are powers of two."""
    for name, size in dims.items():
        if name != "HEADS" and (size < 16 or power_of_two(size) != size):
            raise NoKernel(op=op.name, reason=f"a head's width {name} = {size} is not a power of two from 16 up")


def repeat(low: Lowering, group: Group) -> None:
    """A layer function for each layer of a range: its results take the places of the leading arguments."""
    from moec.codegen.triton.lower.lower import Layer, Lowering

    op = group.anchor
    function = low.phase.module.functions[str(op.attrs["func"])]
    env: dict[Value, Any] = {function.args[0]: Layer(0, True)}
    for argument, operand in zip(function.args[1:], op.operands, strict=True):
        if isinstance(operand.type, CacheType):
            env[argument] = low.env[operand]  # type: ignore[index]
        else:
            env[argument] = low.place(operand)
    into = {}
    for state, returned, result in zip(op.operands, function.returns, op.results, strict=False):
        assert isinstance(state, Value)
        others = [o for o in low.uses[state] if o is not op]
        if others or state in low.function.args:
            raise NoKernel(op=op.name, reason=f"%{state.name} is changed in place while another op reads it")
        low.env[result] = into[returned] = low.place(state)
    inner = Lowering(low.phase, function, env, into)
    low.steps.append({"repeat": [op.attrs["first"], op.attrs["last"]], "function": function.name, "steps": inner.steps})
    low.callees.append(inner)
    inner.run()


def affine(low: Lowering, group: Group) -> None:
    """A layer that stands a fixed number of layers from the loop's own."""
    from moec.codegen.triton.lower.lower import Layer

    op = group.anchor
    if op.attrs["scale"] != 1:
        raise NoKernel(op=op.name, reason="a turn of the loop runs several layers")
    layer = low.env[op.operands[0]]  # type: ignore[index]
    low.env[op.result] = Layer(layer.index + int(op.attrs["offset"]), layer.looped)  # type: ignore[arg-type]


def call(low: Lowering, group: Group) -> None:
    """A layer function for one layer; its results take buffers of their own."""
    from moec.codegen.triton.lower.lower import Layer, Lowering

    op = group.anchor
    function = low.phase.module.functions[str(op.attrs["func"])]
    env: dict[Value, Any] = {function.args[0]: Layer(int(op.attrs["layer"]), False)}  # type: ignore[arg-type]
    for argument, operand in zip(function.args[1:], op.operands, strict=True):
        if isinstance(operand.type, CacheType):
            env[argument] = low.env[operand]  # type: ignore[index]
        else:
            env[argument] = low.place(operand)
    into = {returned: low.place(result) for returned, result in zip(function.returns, op.results, strict=True)}
    inner = Lowering(low.phase, function, env, into)
    low.callees.append(inner)
    inner.run()
    # One layer is no loop: its steps stand where the call does.
    low.steps.append({"repeat": [0, 0], "function": function.name, "steps": inner.steps})


def event(low: Lowering, group: Group) -> None:
    """Record an event on a stream, or make a stream wait for it."""
    op = group.anchor
    low.steps.append({op.name.removeprefix("event."): op.attrs["event"], "stream": op.attrs["stream"]})


HANDLERS = {
    "index.affine": affine,
    "event.record": event,
    "event.wait": event,
    "call": call,
    "linear": linear,
    "linear.heads": linear_heads,
    "moe.route": route,
    "moe.dispatch": dispatch,
    "moe.experts": experts,
    "cache.read": cache_read,
    "attn.mla": attention,
    "attn.mla_absorbed": absorbed,
    "repeat": repeat,
}
