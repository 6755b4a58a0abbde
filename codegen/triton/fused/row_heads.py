"""Rotations and writes into the caches, as parts of a row-wise kernel."""

from __future__ import annotations

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import SCALES, cache_distances, cache_of, pointer, tensor_of, width
from moec.codegen.triton.fused.groups import GROUP, turns_in_registers
from moec.codegen.triton.fused.row_writer import Pairs, RowWriter, Shape, Tile, shape_of
from moec.codegen.triton.specs.recipe import power_of_two
from moec.ir import CacheType, Op, Value


def rope(w: RowWriter, op: Op) -> None:
    """Pairs of every head, turned by the angles of the row's position."""
    x, table = op.operands[0], op.operands[2]
    assert isinstance(x, Value)
    shape = shape_of(x) if len(tensor_of(x).shape) == 3 else Shape(width(x), 1)
    offset, dims = int(op.attrs["offset"]), int(op.attrs["dims"])  # type: ignore[arg-type]
    inside = w.env.get(x)
    appended = op.result not in w.group.outputs(w.function)
    if (offset, dims) != (0, shape.columns) and not appended and w.in_place.get(op.result) is not x:
        raise NoKernel(op=op.name, reason="part of a row is rotated while the row as it was is still wanted")
    heads, half, interleaved = shape.heads, dims // 2, bool(op.attrs["interleaved"])
    suffix = f"{heads}_{dims}_{offset}" + ("i" if interleaved else "")
    position = w.let(f"tl.load({w.input(op, 1)} + row).to(tl.int64)", "position")
    angle = f"{w.data(table)} + {position} * {dims}"
    first, second = ("2 * {0}", "2 * {0} + 1") if interleaved else ("{0}", "{0} + " + str(half))
    pair, order = f"pair{suffix}", "pairs are neighbours" if interleaved else "pairs are halves"
    w.once(pair, [
        f"head{suffix} = tl.arange(0, {power_of_two(heads)})[:, None]",
        f"{pair} = tl.arange(0, {power_of_two(half)})[None, :]  # {order}",
        f"{pair}_in = (head{suffix} < {heads}) & ({pair} < {half})",
        f"first{suffix} = {offset} + {first.format(pair)}",
        f"second{suffix} = {offset} + {second.format(pair)}",
    ])  # fmt: skip
    cos = w.let(f"tl.load({angle} + {pair}, mask={pair} < {half}, other=0.0)", "cos")
    sin = w.let(f"tl.load({angle} + {half} + {pair}, mask={pair} < {half}, other=0.0)", "sin")
    if isinstance(inside, Tile) and turns_in_registers(op):
        rows = power_of_two(heads)
        if interleaved:
            members = f"tl.reshape({inside.name}, ({rows}, {half}, 2))"
        else:
            members = f"tl.permute(tl.reshape({inside.name}, ({rows}, 2, {half})), (0, 2, 1))"
        a, b = w.let("None", "even"), w.let("None", "odd")
        w.body[-2:] = [f"{a}, {b} = tl.split({members})"]
    else:
        base, head = w.row_of(x), w.head(x)
        a, b = (
            w.let(f"tl.load({base} + head{suffix} * {head} + {at}{suffix}, mask={pair}_in, other=0.0).to(tl.float32)")
            for at in ("first", "second")
        )
    turned = w.let(f"{a} * {cos} - {b} * {sin}"), w.let(f"{b} * {cos} + {a} * {sin}")
    w.env[op.result] = Pairs(*turned, suffix, shape, x, offset, dims)


def slot(w: RowWriter, op: Op, cache: CacheType) -> str:
    """The cache row of this row's token, from its sequence, position and page."""
    first = len(op.operands) - 3
    page = int(cache.shape[2])  # type: ignore[arg-type]
    sequence = w.let(f"tl.load({w.input(op, first)} + row).to(tl.int64)", "sequence")
    position = w.let(f"tl.load({w.input(op, first + 1)} + row)", "position")
    entries = w.argument("max_pages", "i32", "size", str(tensor_of(op.operands[-1]).shape[1]))
    table = f"{w.input(op, first + 2)} + {sequence} * {entries} + {position} // {page}"
    return w.let(f"tl.load({table}).to(tl.int64) * {page} + {position} % {page}", "slot")


def append(w: RowWriter, op: Op) -> None:
    """Latent and rotated key; a scaled cache takes the latent in groups of 128 with their scales."""
    cache, _, latent, key = op.operands[:4]
    kind = cache_of(cache)
    assert isinstance(latent, Value) and isinstance(key, Value) and isinstance(cache, Value)
    at_slot = slot(w, op, kind)
    x, rank = w.tile(latent), width(latent)
    row, scale_row, exact_row = cache_distances(kind)
    to = w.argument("cache_ptr", pointer(kind.dtype), "cache", cache)
    base = f"{to} + {at_slot} * {row}"
    value, exact, element = f"{x.name}.to({to}.dtype.element_ty)", f"{base} + {rank}", f"{to}.dtype.element_ty"
    if kind.quant is not None:
        if kind.quant.block[-1] != GROUP:
            raise NoKernel(op=op.name, reason=f"the cache is {kind}; GPU kernels have scales of {GROUP} elements")
        scale = w.argument("cache_scale_ptr", "*" + SCALES[kind.quant.scale], "cache_scale", cache)
        rope_to = w.argument("cache_exact_ptr", pointer("bf16"), "cache_exact", cache)
        groups = -(-rank // GROUP)
        index = w.let(f"tl.arange(0, {power_of_two(groups)})", "g")
        value = w.let(
            f"quantise_groups({x.name}, {scale}, {at_slot} * {scale_row} + {index}, {index} < {groups}, "
            f"{kind.quant.scale == 'ue8m0'}, {element})", "q"
        )  # fmt: skip
        exact, element = f"{rope_to} + {at_slot} * {exact_row}", f"{rope_to}.dtype.element_ty"
    w.body.append(f"tl.store({base} + {w.at(x.shape)}, {value}, mask={x.shape.inside})")
    put(w, key, exact, "0", element)


def append_heads(w: RowWriter, op: Op) -> None:
    """Keys of all heads, then their values."""
    cache, _, key, value = op.operands[:4]
    kind = cache_of(cache)
    assert isinstance(key, Value) and isinstance(value, Value) and isinstance(cache, Value)
    if kind.quant is not None:
        raise NoKernel(op=op.name, reason=f"the cache is {kind}; GPU kernels keep heads as they are")
    columns = int(kind.shape[3])  # type: ignore[arg-type]
    to = w.argument("cache_ptr", pointer(kind.dtype), "cache", cache)
    base = f"{to} + {slot(w, op, kind)} * {columns}"
    element = f"{to}.dtype.element_ty"
    put(w, key, base, str(shape_of(key).columns), element)
    put(w, value, f"{base} + {width(key)}", str(shape_of(value).columns), element)


def append_index(w: RowWriter, op: Op) -> None:
    """An index key, at the end of the cached row."""
    cache, _, key = op.operands[:3]
    kind = cache_of(cache)
    assert isinstance(key, Value) and isinstance(cache, Value)
    if kind.quant is not None:
        raise NoKernel(op=op.name, reason=f"the cache is {kind}; GPU kernels keep index keys as they are")
    columns = int(kind.shape[3])  # type: ignore[arg-type]
    to = w.argument("cache_ptr", pointer(kind.dtype), "cache", cache)
    base = f"{to} + {slot(w, op, kind)} * {columns} + {columns - width(key)}"
    put(w, key, base, "0", f"{to}.dtype.element_ty")


def put(w: RowWriter, part: Value, base: str, head: str, element: str) -> None:
    """Write a value's row, rotated in this kernel or as it is, behind `base` with `head` elements between heads."""
    made = w.env.get(part)
    if not isinstance(made, Pairs):
        x = w.tile(part)
        w.body.append(f"tl.store({base} + {w.at(x.shape, head)}, {x.name}.to({element}), mask={x.shape.inside})")
        return
    w.store_pairs(made, base, head, element)
    if made.dims < made.shape.columns:
        shape = made.shape
        rest = w.load(w.row_of(made.source), shape, w.head(made.source))
        outside = f"(({shape.name} < {made.offset}) | ({shape.name} >= {made.offset + made.dims}))"
        mask = f"{shape.inside} & {outside}"
        w.body.append(f"tl.store({base} + {w.at(shape, head)}, {rest}.to({element}), mask={mask})")


OPS = {
    "rope": rope,
    "cache.append": append,
    "cache.append_heads": append_heads,
    "cache.append_index": append_index,
}
