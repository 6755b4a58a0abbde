"""Memory planning: where each value of a function lives in one arena, views and in-place results included.

Sizes are those at the compiled limits, in elements of 4 bytes. Values whose lifetimes do not meet share bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import ClassVar

from moec.codegen.arena import Slot, assign
from moec.errors import InputError
from moec.ir import Function, IndexType, Op, TensorType, Value, print_op

ALIGN = 16
"""Elements (4 bytes each) to which buffers are rounded: one cache line."""


VIEWS = ("split", "unflatten", "flatten", "rope", "moe.dispatch", "comm.all_reduce")
"""Ops whose results may share the bytes of what they read."""


class StateReadLater(InputError):
    """Layers that run over a value which an op behind them reads."""

    template: ClassVar[str] = (
        "%{value} is read after the layers that run over it in place: {op}; CPUs have no copy of it"
    )


@dataclass(frozen=True)
class Place:
    """Where a value stands: a slot or an argument (`base`), its first element, its shape and strides in elements."""

    base: Slot | Value
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    keeps: tuple[Slot, ...] = ()
    """Other slots that must live as long as this value."""

    @property
    def ld(self) -> int:
        """Elements from one row to the next."""
        return self.strides[0]


@dataclass
class Layout:
    """Places of all values of a function, extra buffers of its ops, and the elements that the arena needs."""

    places: dict[Value, Place] = field(default_factory=dict)
    extra: dict[Op, list[Slot]] = field(default_factory=dict)
    size: int = 0


def plan_function(
    function: Function,
    symbols: Mapping[str, int],
    extra_sizes: Mapping[Op, list[int]],
    result_into: Mapping[Value, Value],
    kept: Set[Value] = frozenset(),
) -> Layout:
    """Plan one function; `result_into` says which returned value is written into which argument's buffer.

    `extra_sizes` gives the elements of the temporary buffers that an op's kernels pass between them. Values that are
    `kept` share their bytes with nothing: the ops around them may run in another order than theirs.
    """
    layout = Layout()
    for arg in function.args:
        if isinstance(arg.type, TensorType):
            shape = arg.type.bound(symbols)
            layout.places[arg] = Place(arg, 0, shape, _contiguous(shape))
    last_use = _last_uses(function) | dict.fromkeys(kept, len(function.ops))
    slots: list[Slot] = []

    def new_slot(size: int, position: int, last: int) -> Slot:
        slot = Slot(-(-max(size, 1) // ALIGN) * ALIGN, position, last)
        slots.append(slot)
        return slot

    for position, op in enumerate(function.ops):
        layout.extra[op] = [new_slot(s, position, position) for s in extra_sizes.get(op, [])]
        for i, value in enumerate(op.results):
            if isinstance(value.type, IndexType):
                continue
            assert isinstance(value.type, TensorType)
            shape = value.type.bound(symbols)
            place = _view(op, i, shape, layout, last_use, position)
            if place is None and value in result_into:
                place = Place(result_into[value], 0, shape, _contiguous(shape))
            if place is None:
                # Latent and rotary key are read in one go, side by side in rows of the cache's width.
                beside = _key_width(op) if op.name == "cache.read" else 0
                strides = (shape[1] + beside, 1) if beside else _contiguous(shape)
                place = Place(new_slot(shape[0] * strides[0], position, position), 0, shape, strides)
            layout.places[value] = place
        for value in (*op.values(), *op.results):
            _touch(layout, value, position)
    for value in function.returns:
        _touch(layout, value, len(function.ops))
    for value in kept:
        if value in layout.places:
            place = layout.places[value]
            for slot in (*place.keeps, *((place.base,) if isinstance(place.base, Slot) else ())):
                slot.first, slot.last = 0, len(function.ops)
    layout.size = assign(slots)
    return layout


def _key_width(op: Op) -> int:
    """Elements of a rotary key, the second result of `cache.read`."""
    key = op.results[1].type
    assert isinstance(key, TensorType) and isinstance(key.shape[1], int)
    return key.shape[1]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :], start=1) for i in range(len(shape)))


def _last_uses(function: Function) -> dict[Value, int]:
    out = dict.fromkeys(function.returns, len(function.ops))
    for position, op in enumerate(function.ops):
        for value in op.values():
            out[value] = max(position, out.get(value, 0))
    return out


def _view(
    op: Op, result: int, shape: tuple[int, ...], layout: Layout, last_use: Mapping[Value, int], position: int
) -> Place | None:
    """The place of a result that shares its operand's bytes; None when it needs its own."""
    if op.name == "cache.read" and result == 1:
        latent = layout.places[op.results[0]]
        return replace(latent, offset=latent.offset + latent.shape[1], shape=shape)
    if not op.operands or not isinstance(op.operands[0], Value) or op.operands[0] not in layout.places:
        return None
    x = layout.places[op.operands[0]]
    match op.name:
        case "split":
            sizes = op.attrs["sizes"]
            assert isinstance(sizes, tuple)
            start = sum(s for s in sizes[:result] if isinstance(s, int))
            return replace(x, offset=x.offset + start, shape=shape)
        case "unflatten":
            return replace(x, shape=shape, strides=(*x.strides[:-1], *_contiguous(shape[len(x.shape) - 1 :])))
        case "flatten":
            assert x.strides[1:] == _contiguous(x.shape)[1:], "flatten of rows that are not contiguous"
            return replace(x, shape=shape, strides=(x.ld, 1))
        case "rope" | "comm.all_reduce":
            # In place, unless somebody still reads the unrotated value, by this name or by another.
            return None if _read_later(op.operands[0], layout, last_use, position) else replace(x, shape=shape)
        case "moe.dispatch" if result == 0:
            # Rows are never copied: the grouped product gathers them from x by the index of their token.
            return replace(x, keeps=(*x.keeps, layout.extra[op][0]))
        case "repeat":
            if _read_later(op.operands[0], layout, last_use, position):
                raise StateReadLater(value=op.operands[0].name, op=print_op(op))
            return replace(x, shape=shape)
    return None


def _read_later(value: Value, layout: Layout, last_use: Mapping[Value, int], position: int) -> bool:
    """Whether a later op reads elements of a value, which other values may be views of, or the other way round."""
    place = layout.places[value]
    mine: Set[int] = frozenset()
    for other, found in layout.places.items():
        if found.base is place.base and last_use.get(other, -1) > position:
            mine = mine or _columns(place)
            if found.ld != place.ld or mine & _columns(found):
                return True
    return False


def _columns(place: Place) -> frozenset[int]:
    """Elements of the first row of a place, counted from where its buffer begins."""
    at = product(*(range(0, n * s, s) for n, s in zip(place.shape[1:], place.strides[1:], strict=True)))
    return frozenset(place.offset + sum(steps) for steps in at)


def _touch(layout: Layout, value: Value, position: int) -> None:
    place = layout.places.get(value)
    if place is None:
        return
    for slot in (place.base, *place.keeps):
        if isinstance(slot, Slot):
            slot.last = max(slot.last, position)


def loop_result(function: Function) -> dict[Value, Value]:
    """For a layer function: its returned value is written over its first tensor argument when that is dead by then.

    Returns an empty mapping when the argument is still read by or after the op that makes the result; the emitter then
    copies.
    """
    (returned,) = function.returns
    x = function.args[1]
    made = next((i for i, op in enumerate(function.ops) if returned in op.results), -1)
    seen, last = {x}, -1
    for i, op in enumerate(function.ops):
        if seen & set(op.values()):
            last = i
            if op.name in VIEWS:
                seen.update(op.results)
    in_place = made >= 0 and function.ops[made].name in ("add", "norm.add_rms") and last <= made
    return {returned: x} if last < made or in_place else {}


def symbol_bounds(max_tokens: int, max_rows: int, context: int, batch: int, page: int) -> dict[str, int]:
    """Greatest value of every symbol of an entry function."""
    pages = -(-context // page)
    return {"T": max_tokens, "R": max_rows, "S": context, "C": context, "B": batch, "N": pages, "P": batch * pages}
