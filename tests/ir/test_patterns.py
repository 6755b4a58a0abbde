"""Patterns find ops by what feeds them, and bind what a pass asks for."""

from __future__ import annotations

import pytest

from moec.ir import Function, WeightRef, parse_module
from moec.ir.patterns import Pattern, match, matches

TEXT = """
module @m {version = 1} {
  weight @w: f32[8, 8] {
    %0 = weight.load {tensor = w, shape = [8, 8], dtype = f32} : f32[8, 8]
    return %0
  }
  weight @n: f32[8] {
    %0 = weight.load {tensor = n, shape = [8], dtype = f32} : f32[8]
    return %0
  }
  func @f(%x: f32[T, 8], %y: f32[T, 8]) -> (f32[T, 8], f32[T, 8]) {
    %0 = linear %x, @w : f32[T, 8]
    %1 = add %0, %y : f32[T, 8]
    %2 = norm.rms %1, @n {eps = 1e-06} : f32[T, 8]
    %3 = linear %2, @w : f32[T, 8]
    %4 = add %3, %1 : f32[T, 8]
    %5 = norm.rms %4, @n {eps = 1e-06} : f32[T, 8]
    return %4, %5
  }
}
"""


@pytest.fixture
def function() -> Function:
    return parse_module(TEXT).functions["f"]


def test_ops_are_bound_by_name(function: Function) -> None:
    pattern = Pattern("norm.rms|norm.layer", (Pattern("add", (Pattern("linear", bind="product"),), bind="sum"),))
    found = matches(function, pattern)
    assert [op for op, _ in found] == [function.ops[2], function.ops[5]]
    assert found[0][1] == {"sum": function.ops[1], "product": function.ops[0]}


def test_an_op_that_others_use_is_not_alone(function: Function) -> None:
    """The first sum is used by the next, the second is returned; the products are used once."""
    assert not matches(function, Pattern("norm.rms", (Pattern("add", alone=True),)))
    assert len(matches(function, Pattern("add", (Pattern("linear", alone=True),)))) == 2


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (Pattern("linear", (None, WeightRef)), 2),
        (Pattern("linear", (WeightRef,)), 0),
        (Pattern("linear", (Pattern("norm.rms"), WeightRef)), 1),
        (Pattern("add", (None, Pattern("add"))), 1),
        (Pattern("linear", (None, None, None)), 0),
        (Pattern("softmax"), 0),
    ],
)
def test_operands_decide(function: Function, pattern: Pattern, count: int) -> None:
    assert len(matches(function, pattern)) == count


def test_one_op_alone_can_be_asked(function: Function) -> None:
    assert match(function, function.ops[4], Pattern("add", (Pattern("linear"),), bind="it")) == {"it": function.ops[4]}
    assert match(function, function.ops[0], Pattern("add")) is None
