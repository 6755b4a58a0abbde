"""One handler for each kind of group: which kernels it takes and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import tensor_of, width
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.products import Add, Bias, Product, Store, SwiGlu
from moec.codegen.triton.fused.products import Step as TileStep
from moec.codegen.triton.fused.rows import rows_kernel
from moec.codegen.triton.lower import emit_attention, emit_comm, emit_control, emit_moe
from moec.codegen.triton.lower.launching import bound, launch_product, typed
from moec.codegen.triton.spec import serving
from moec.ir import Value, WeightRef

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering


def emit(low: Lowering, group: Group) -> None:
    """Append the steps of a group. Raises NoKernel for an op that no kernel computes."""
    if group.rowwise:
        return rows(low, group)
    HANDLERS.get(group.anchor.name, served)(low, group)
    return None


def served(low: Lowering, group: Group) -> None:
    """An op of somebody else's: by the first kernel whose declaration says how it computes it. Raises NoKernel."""
    op, table = group.anchor, low.phase.table
    for spec in serving(op.name, table.arch):
        if spec.serve is None:
            continue
        use = spec.serve(op)
        given = {n: v for n, v in use.arguments.items() if isinstance(v, Value | WeightRef)}
        places = {n: low.place(v) for n, v in given.items()}
        for name, value in given.items():
            if isinstance(value, Value) and places[name].row != width(value):
                raise NoKernel(op=op.name, reason=f"%{value.name} has gaps between its rows")
        dims = {n: size for n, size in use.dims.items() if isinstance(size, int)}
        instance = typed(table.instance(spec, low.phase.shape, **dims), **given)
        return low.launch(instance, group, {**use.arguments, **places}, use.dims)
    raise NoKernel(op=op.name, reason="the GPU back end has none")


def rows(low: Lowering, group: Group) -> None:
    """A chain of row-wise ops."""
    in_place = {
        op.result: op.operands[0]
        for op in group.ops
        if op.name == "rope" and isinstance(op.operands[0], Value) and low.rotates_in_place(op)
    }
    for op in group.ops:
        if op.name.startswith("cache.append"):
            low.layers[op.operands[0]] = op.operands[1]
        if op.name == "moe.weigh":
            emit_moe.weighed(low, group, op)
    made = rows_kernel(group, low.function, "kernel", in_place)
    instance = low.phase.table.generated(made, low.phase.shape)
    low.launch(instance, group, bound(low, instance.signature, made), {"ROWS": made.rows})


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
            steps.append(SwiGlu.of(op.attrs))
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


HANDLERS: dict[str, Callable[[Lowering, Group], None]] = {
    "index.affine": emit_control.affine,
    "event.record": emit_control.event,
    "event.wait": emit_control.event,
    "call": emit_control.call,
    "repeat": emit_control.repeat,
    "linear": linear,
    "linear.heads": linear_heads,
    "moe.route": emit_moe.route,
    "moe.dispatch": emit_moe.dispatch,
    "moe.experts": emit_moe.experts,
    "cache.read": emit_attention.cache_read,
    "attn.mla": emit_attention.attention,
    "attn.mla_absorbed": emit_attention.absorbed,
    "attn.heads": emit_attention.heads,
    "attn.index": emit_attention.index,
    "comm.all_reduce": emit_comm.all_reduce,
    "comm.dispatch": emit_comm.dispatch,
    "comm.combine": emit_comm.combine,
    **dict.fromkeys(
        ("comm.all_gather", "comm.reduce_scatter", "comm.all_to_all", "comm.rows", "comm.send", "comm.recv"),
        emit_comm.plain,
    ),
}
