"""Exchanges between ranks: what the runtime's communicator moves, and the kernels that pack and unpack it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import tensor_of, width
from moec.codegen.triton.fused.groups import VIEWS, Group
from moec.codegen.triton.lower.emit_attention import given_place
from moec.codegen.triton.lower.emit_moe import padded_rows
from moec.codegen.triton.lower.launching import typed
from moec.codegen.triton.lower.places import Base, Place, Step
from moec.codegen.triton.spec import kernel
from moec.ir import Value
from moec.ir.types import BITS, SCALE_BITS

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering


def all_reduce(low: Lowering, group: Group) -> None:
    """The sum over ranks: in the memory of the operand, where nobody else reads that."""
    op = group.anchor
    (x,) = op.operands
    assert isinstance(x, Value)
    at, made = low.place(x), low.function.producer().get(x)
    alone = low.uses[x] == [op] and x not in low.function.returns and op.result not in low.into
    if alone and at.base in low.slots and made is not None and made.name not in VIEWS:
        low.env[op.result] = at
    plain(low, group)


def plain(low: Lowering, group: Group) -> None:
    """A collective that takes and gives tensors as they lie."""
    op = group.anchor
    inputs = [v for o in op.operands if isinstance(o, Value) for v in parts(low, o)]
    collective(low, group, op.name.removeprefix("comm."), inputs, [v for r in op.results for v in parts(low, r)])


def dispatch(low: Lowering, group: Group) -> None:
    """Slots of the pairs, their rows in the order of slots, the exchange, and the order of what arrived by slot."""
    op = group.anchor
    layer, x, ids, _ = op.operands
    assert isinstance(layer, Value) and isinstance(x, Value) and isinstance(ids, Value)
    rows_, offsets, handle = op.results
    wanted = {o.name for o in low.uses.get(rows_, [])} | {o.name for o in low.uses.get(offsets, [])}
    if others := wanted - {"moe.experts", "moe.weigh"}:
        raise NoKernel(op=op.name, reason=f"its rows are read by {', '.join(sorted(others))}")
    slots, experts, ranks = (int(op.attrs[n]) for n in ("slots", "experts", "ranks"))  # type: ignore[arg-type]
    tokens, top_k, local, align = str(tensor_of(x).shape[0]), width(ids), slots // ranks, low.phase.align
    pairs, arrived_ = f"({tokens}) * {top_k}", str(op.attrs["rows"])
    table, count, source = low.phase.table, counters(low, slots), whole_numbers(low, pairs)
    slot, row = whole_numbers(low, pairs), whole_numbers(low, pairs)
    live = given_place(op, "live").part(int(tokens.startswith("U")))
    low.launch(table.instance(kernel("choose_slots"), "any", E=experts, SLOTS=slots, TOP_K=top_k), group, {
        "index_ptr": low.place(ids), "table_ptr": placement(low, layer, slots, experts, int(op.attrs["first"])),  # type: ignore[arg-type]
        "live_ptr": live, "slot_ptr": slot, "count_ptr": count, "PAIRS": pairs,
        "source": "RANK",
    }, {})  # fmt: skip
    # Blocks of one row: no padding between slots.
    each = whole_numbers(low, pairs)
    low.launch(table.instance(kernel("permutation_contiguous"), "any", E=slots, TOP_K=top_k, ALIGN=1), group, {
        "index_ptr": slot, "count_ptr": count, "slot_ptr": row, "source_ptr": source, "block_expert_ptr": each,
        "PAIRS": pairs, "ROWS": pairs, "capacity": 0,
    }, {})  # fmt: skip
    packed = buffers(low, x, pairs)
    move(low, group, x, places_of(low, x), packed, source, pairs)
    arrived, came = buffers(low, x, arrived_), Place(low.slot(slots * 4), 0, local, local, 4)
    collective(
        low, group, "dispatch_rows",
        [*views(low, x, packed, pairs), view(low, count, "i32", (slots,))],
        [*views(low, x, arrived, arrived_), view(low, came, "i32", (slots,))],
    )  # fmt: skip
    total = padded_rows(low, arrived_, 1, local)
    sorted_, back = whole_numbers(low, total), whole_numbers(low, arrived_)
    blocks = Place(low.slot(low.phase.most(total) // align * 4), 0, 1, 1, 4)
    low.launch(table.instance(kernel("sort_arrived"), "any", RANKS=ranks, LOCAL=local, ALIGN=align), group, {
        "count_ptr": came, "source_ptr": sorted_, "place_ptr": back, "block_expert_ptr": blocks, "ROWS": total,
    }, {})  # fmt: skip
    low.env[rows_] = arrived[0]
    if len(arrived) == 2:
        low.scales[rows_] = arrived[1]
    low.env[handle] = came
    low.extra["source", rows_], low.extra["blocks", rows_] = sorted_, blocks
    low.extra["back", handle], low.extra["row", handle] = back, row


def combine(low: Lowering, group: Group) -> None:
    """Results in the order in which their rows came, the exchange back, and each token's weighted sum."""
    op = group.anchor
    rows_, handle, weights = op.operands
    assert isinstance(rows_, Value) and isinstance(handle, Value) and isinstance(weights, Value)
    if ("back", handle) not in low.extra:
        raise NoKernel(op=op.name, reason=f"%{handle.name} is not made by comm.dispatch in this function")
    if tensor_of(rows_).quant is not None:
        raise NoKernel(op=op.name, reason=f"results travel as {tensor_of(rows_)}; BF16 and FP32 have a kernel")
    back, row = low.extra["back", handle], low.extra["row", handle]
    low.touch(back)
    low.touch(row)
    tokens, top_k, columns = str(tensor_of(weights).shape[0]), width(weights), width(rows_)
    pairs, arrived = f"({tokens}) * {top_k}", str(op.attrs["rows"])
    sent, home = buffers(low, rows_, arrived), buffers(low, rows_, pairs)
    move(low, group, rows_, [low.place(rows_)], sent, back, arrived)
    collective(
        low, group, "combine_rows",
        [*views(low, rows_, sent, arrived), view(low, low.place(handle), "i32", (int(op.attrs["slots"]),))],  # type: ignore[arg-type]
        views(low, rows_, home, pairs),
    )  # fmt: skip
    instance = low.phase.table.instance(kernel("unpermute"), "any", TOP_K=top_k)
    low.launch(typed(instance, x_ptr=rows_, weight_ptr=weights, y_ptr=op.result), group, {
        "x_ptr": home[0], "slot_ptr": row, "weight_ptr": low.place(weights), "y_ptr": low.place(op.result),
        "D": columns,
    }, {"T": tokens, "D": columns})  # fmt: skip


def placement(low: Lowering, layer: Value, slots: int, experts: int, first: int) -> Place:
    """The table of a layer's slots; one for all layers where no placement is given."""
    size = 4 * (experts + 1 + 2 * slots)
    if not low.phase.module.attrs.get("placement"):
        return Place(Base("placement", "slots"), 0, 1, 1, 4)
    return low.env[layer].of("placement", "slots", size, first, (1, 1, 4))  # type: ignore[no-any-return]


def counters(low: Lowering, count: int) -> Place:
    """So many zeros to count in."""
    made = Place(low.slot(count * 4), 0, count, count, 4)
    low.later(low.step({"fill": None, "bytes": str(count * 4)}), "fill", made)
    return made


def whole_numbers(low: Lowering, count: str) -> Place:
    """Room for so many i32."""
    return Place(low.slot(4 * low.phase.most(count)), 0, 1, 1, 4)


def buffers(low: Lowering, x: Value, rows: str) -> list[Place]:
    """Room for so many rows of the kind of `x`, and for their scales."""
    made = []
    for columns, size in columns_of(x):
        made.append(Place(low.slot(low.phase.most(rows) * columns * size), 0, columns, columns, size))
    return made


def columns_of(x: Value) -> list[tuple[int, int]]:
    """Elements of a row and bytes of each: of the data, and of the scales where there are any."""
    t, columns = tensor_of(x), width(x)
    found = [(columns, BITS[t.dtype] // 8)]
    if t.quant is not None:
        found.append((-(-columns // t.quant.block[-1]), SCALE_BITS[t.quant.scale] // 8))
    return found


def places_of(low: Lowering, x: Value) -> list[Place]:
    """Where a tensor lies, and its scales. Raises NoKernel for rows with gaps between heads."""
    at = low.place(x)
    if len(tensor_of(x).shape) > 2 and at.head != int(tensor_of(x).shape[-1]):  # type: ignore[arg-type]
        raise NoKernel(op="comm", reason=f"%{x.name} has gaps between its heads")
    return [at, low.scale(x)] if tensor_of(x).quant is not None else [at]


def move(
    low: Lowering, group: Group, x: Value, source: list[Place], to: list[Place], index: Place, rows: str
) -> None:  # fmt: skip
    """Rows `index[r]` of a tensor of the kind of `x`, one behind the other."""
    columns = width(x)
    if source[0].row != columns:
        raise NoKernel(op=group.anchor.name, reason=f"%{x.name} has gaps between its rows")
    scaled = len(source) == 2
    instance = low.phase.table.instance(kernel("permute_fp8" if scaled else "permute"), "any")
    given: dict[str, Any] = {"x_ptr": source[0], "source_ptr": index, "y_ptr": to[0], "D": columns}
    if scaled:
        given |= {"scale_ptr": source[1], "y_scale_ptr": to[1]}
        kind = "*fp32" if source[1].itemsize == 4 else "*u8"
        instance = typed(instance, {"scale_ptr": kind, "y_scale_ptr": kind})
    low.launch(typed(instance, x_ptr=x, y_ptr=x), group, given, {"R": rows, "D": columns})


def parts(low: Lowering, x: Value) -> list[Step]:
    """A tensor as a collective finds it: its data, and its scales."""
    return views(low, x, places_of(low, x), str(tensor_of(x).shape[0]))


def views(low: Lowering, x: Value, places: list[Place], rows: str) -> list[Step]:
    """The places of a tensor of so many rows."""
    t = tensor_of(x)
    # Only sums look into the numbers: what cannot be summed travels as bytes.
    kinds = [t.dtype if t.quant is None else "u8", "f32" if places[-1].itemsize == 4 else "u8"]
    return [
        view(low, p, kind, (rows, columns)) for p, kind, (columns, _) in zip(places, kinds, columns_of(x), strict=False)
    ]


def view(low: Lowering, place: Place, kind: str, shape: tuple[int | str, ...]) -> Step:
    """Address, element type, shape over run-time symbols, and elements from row to row."""
    low.touch(place)
    made: Step = {"at": None, "dtype": kind, "shape": [str(d) for d in shape], "ld": place.row}
    low.later(made, "at", place)
    return made


def collective(low: Lowering, group: Group, name: str, inputs: list[Step], outputs: list[Step]) -> None:
    """A step for the communicator."""
    op = group.anchor
    where = str(op.loc) if op.loc else low.function.name
    low.step({
        "collective": name,
        "attrs": {k: list(v) if isinstance(v, tuple) else v for k, v in op.attrs.items()},
        "inputs": inputs,
        "outputs": outputs,
        "where": where.removeprefix("loc(").removesuffix(")"),
    })  # fmt: skip
