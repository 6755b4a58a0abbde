"""Where the CPU's memory plan puts values: what an op reads is still there when it runs.

The plan is followed with a shadow of the memory that remembers, for every element, which value was written there last;
functions are drawn at random from ops that move, view and change values in place.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.arena import Slot
from moec.codegen.tvm.memory import StateReadLater, loop_result, plan_function
from moec.ir import Function, TensorType, Value, parse_module

VIEWS = ("split", "unflatten", "flatten")
IN_PLACE = ("add", "rope")
"""Ops whose kernels take each element before they write it."""
SYMBOLS = {"T": 3}
Cell = tuple[Any, int]
"""An element of the arena or of an argument."""


class Shadow:
    """Follows the plan of a layer function op by op."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.layout = plan_function(function, SYMBOLS, {}, loop_result(function))
        self.memory: dict[Cell, Value] = {}
        self.held: dict[Value, dict[Cell, Value]] = {}
        """What each value's elements hold, by the value that was written there."""

    def cells(self, value: Value) -> list[Cell]:
        place = self.layout.places[value]
        base: Any = place.base
        start = place.offset
        if isinstance(place.base, Slot):  # a part of the one arena
            start, base = start + place.base.offset, "arena"
        at = product(*(range(n) for n in place.shape))
        return [(base, start + sum(i * s for i, s in zip(index, place.strides, strict=True))) for index in at]

    def define(self, value: Value, written: bool) -> None:
        if written:
            self.memory.update(dict.fromkeys(self.cells(value), value))
        self.held[value] = {cell: self.memory[cell] for cell in self.cells(value)}

    def check(self, value: Value, reader: str) -> None:
        for cell, held in self.held[value].items():
            assert self.memory[cell] is held, f"{reader} reads %{value.name}, where %{self.memory[cell].name} stands"

    def run(self) -> None:
        for arg in self.function.args:
            if isinstance(arg.type, TensorType):
                self.define(arg, written=True)
        for op in self.function.ops:
            for value in op.values():
                self.check(value, op.name)
            for result in op.results:
                read = {cell for value in op.values() for cell in self.held[value]}
                assert op.name in (*VIEWS, *IN_PLACE) or not read & set(self.cells(result)), f"{op.name} over its input"
                self.define(result, written=op.name not in VIEWS)
        for value in self.function.returns:
            self.check(value, "return")


def layer(*lines: str) -> Function:
    """A layer function of %x: f32[T, 16]; the last line's value is its result."""
    body = "".join(f"    {line}\n" for line in lines)
    head = "  func @f(%x: f32[T, 16], %pos: i32[T], %table: f32[8, 4]) -> f32[T, 16] {\n"
    result = lines[-1].split()[0]
    text = f"module @m {{version = 1}} {{\n{head}{body}    return {result}\n  }}\n}}\n"
    function = parse_module(text).functions["f"]
    # A layer function begins with its layer, which the plan does not read.
    function.args[:2] = [function.args[1], function.args[0]]
    return function


ROPE = "%pos, %table {offset = 0, dims = 4, interleaved = false}"
ALIASED = {
    "rope of a view whose source is read later": layer(
        "%0 = scale %x {factor = 2.0} : f32[T, 16]",
        "%1 = unflatten %0 {sizes = [4, 4]} : f32[T, 4, 4]",
        f"%2 = rope %1, {ROPE} : f32[T, 4, 4]",
        "%3 = flatten %2 : f32[T, 16]",
        "%4 = add %0, %3 : f32[T, 16]",
    ),
    "rope of a view of the argument": layer(
        "%0 = unflatten %x {sizes = [4, 4]} : f32[T, 4, 4]",
        f"%1 = rope %0, {ROPE} : f32[T, 4, 4]",
        "%2 = flatten %1 : f32[T, 16]",
        "%3 = add %x, %2 : f32[T, 16]",
    ),
    "a part that is read after its rotation": layer(
        "%0 = scale %x {factor = 2.0} : f32[T, 16]",
        "%1, %2 = split %0 {sizes = [4, 12]} : f32[T, 4], f32[T, 12]",
        f"%3 = rope %1, {ROPE} : f32[T, 4]",
        "%4 = add %3, %1 : f32[T, 4]",
        "%5 = scale %4 {factor = 2.0} : f32[T, 4]",
        "%6 = add %0, %x : f32[T, 16]",
    ),
}


@pytest.mark.parametrize("name", ALIASED)
def test_what_is_rotated_in_place_is_read_by_nobody_else(name: str) -> None:
    Shadow(ALIASED[name]).run()


def test_layers_over_a_value_that_is_read_later_are_refused() -> None:
    text = """module @m {version = 1} {
  func @f(%l: index, %x: f32[T, 16]) -> f32[T, 16] {
    %0 = add %x, %x : f32[T, 16]
    return %0
  }
  func @decode(%x: f32[T, 16]) -> f32[T, 16] {
    %0 = scale %x {factor = 2.0} : f32[T, 16]
    %1 = repeat %0 {func = f, first = 0, last = 1} : f32[T, 16]
    %2 = add %0, %1 : f32[T, 16]
    return %2
  }
}
"""
    with pytest.raises(StateReadLater, match=r"^%0 is read after the layers that run over it in place: %1 = repeat"):
        plan_function(parse_module(text).functions["decode"], SYMBOLS, {}, {})


@st.composite
def functions(draw: st.DrawFn) -> Function:
    """A function of a dozen ops over [T, n] and [T, h, n]."""
    values: list[tuple[str, tuple[int, ...]]] = [("%x", (16,))]
    lines: list[str] = []

    def emit(op: str, *shapes: tuple[int, ...]) -> None:
        names = [f"%{sum(line.count('=') for line in lines)}_{i}" for i in range(len(shapes))]
        types = ", ".join(f"f32[{', '.join(map(str, ('T', *shape)))}]" for shape in shapes)
        lines.append(f"{', '.join(names)} = {op} : {types}")
        values.extend(zip(names, shapes, strict=True))

    for _ in range(draw(st.integers(3, 12))):
        name, shape = draw(st.sampled_from(values[-5:]))
        kind = draw(st.sampled_from(("scale", "add", "split", "unflatten", "rope", "rope", "flatten", "swiglu")))
        flat, width = len(shape) == 1, shape[-1]
        if kind == "rope" and width >= 4:
            emit(f"rope {name}, {ROPE}", shape)
        elif kind == "split" and width >= 4:
            part = draw(st.sampled_from((width // 4, width // 2)))
            emit(f"split {name} {{sizes = [{part}, {width - part}]}}", (*shape[:-1], part), (*shape[:-1], width - part))
        elif kind == "unflatten" and flat and width % 4 == 0:
            emit(f"unflatten {name} {{sizes = [{width // 4}, 4]}}", (width // 4, 4))
        elif kind == "flatten" and not flat and shape[-1] == 4:
            emit(f"flatten {name}", (shape[0] * shape[1],))
        elif kind == "swiglu" and flat and width % 2 == 0:
            emit(f"swiglu {name}", (width // 2,))
        elif kind == "scale" and flat:
            emit(f"scale {name} {{factor = 2.0}}", shape)
        elif flat:
            emit(f"add {name}, {draw(st.sampled_from([n for n, s in values if s == shape]))}", shape)
    wide = [n for n, s in values if s == (16,)]
    emit(f"add {draw(st.sampled_from(wide))}, {draw(st.sampled_from(wide))}", (16,))
    return layer(*lines)


@settings(max_examples=200, deadline=None)
@given(functions())
def test_nothing_is_read_after_it_was_overwritten(function: Function) -> None:
    Shadow(function).run()
