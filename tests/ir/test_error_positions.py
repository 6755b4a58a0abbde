"""Wrong texts and the line, column and message that each must give."""

from __future__ import annotations

import pytest
from parser_texts import GOOD

from moec.ir import ParseError, parse_module, print_module

CASES = {
    "missing type": ("@w[%l] : bf16[T, 16] loc", "@w[%l] loc", 7, 28, "expected ':' and the type of %0"),
    "unknown op, near name": ("swiglu %0", "swigl %0", 8, 10,
                              "unknown op swigl (did you mean swiglu, weight.slot, weight.load?)"),
    "redefined value": ("%1 = swiglu", "%0 = swiglu", 8, 5, "%0 is defined twice"),
    "redefined argument": ("%l: index, %x", "%x: index, %x", 6, 26, "argument %x is defined twice"),
    "use before definition": ("swiglu %0", "swiglu %2", 8, 17, "%2 is used before it is defined"),
    "wrong arity": ("add %x, %1", "add %x", 9, 10, "add: add takes 2 operands (a b), got 1"),
    "dim mismatch": ("%x: bf16[T, 8]) ->", "%x: bf16[T, 9]) ->", 7, 10,
                     "linear: inner dims of x and w: 9 and 8 differ"),
    "scale formats mixed": ("%1, %2 = split %0 {sizes = [5, 3]} : bf16[T, 5], bf16[T, 3]",
                            "%1 = linear %q, %k : bf16[T, 64]", 14, 10,
                            "linear: scale formats differ: x has ue8m0, w has f32; re-quantise one of them"),
    "attribute of the wrong kind": ("first = 0", "first = 0.5", 13, 10,
                                    "repeat: attribute first of repeat must be int, got 0.5"),
    "unknown attribute": ("first = 0", "frist = 0", 13, 10,
                          "repeat: repeat has no attribute 'frist' (it has: func, first, last)"),
    "missing attribute": (", last = 3", "", 13, 10, "repeat: repeat needs attribute 'last' (int)"),
    "attribute given twice": ("first = 0", "last = 0", 13, 45, "attribute last is given twice"),
    "unknown weight": ("@w[%l] :", "@v[%l] :", 7, 21, "no weight @v (known: w)"),
    "weight index of another type": ("@w[%l] :", "@w[%x] :", 7, 21, "@w must be indexed by an index value"),
    "too many weight indices": ("@w[%l] :", "@w[%l, %l] :", 7, 21, "@w has 1 indices, got 2"),
    "wrong version": ("version = 1", "version = 2", 1, 11,
                      "text version 2 is not the version 1 that this moec reads"),
    "no version": ("{version = 1, target = cpu} ", "", 1, 11,
                   "text version None is not the version 1 that this moec reads"),
    "another type than inferred": ("swiglu %0 : bf16[T, 8]", "swiglu %0 : bf16[T, 4]", 8, 22,
                                   "swiglu gives bf16[T, 8], the text says bf16[T, 4]"),
    "unknown element type": ("%x: bf16[T, 8]) ->", "%x: bf61[T, 8]) ->", 6, 30,
                             "unknown type bf61 (did you mean bf16, f64, f16?)"),
    "unknown scale format": ("scale(ue8m0,", "scale(ue8m1,", 12, 57,
                             "unknown scale format ue8m1 (did you mean ue8m0?)"),
    "granularity beyond the rank": ("1x128)", "1x1x128)", 12, 64,
                                    "granularity 1x1x128 has more dims than the tensor"),
    "unclosed dims": ("%x: bf16[T, 8]) ->", "%x: bf16[T, 8) ->", 6, 35, "expected ']' after the dims"),
    "dim too large": ("%x: bf16[T, 8]) ->", "%x: bf16[T, 99999999999999999999]) ->", 6, 38,
                      "dimension too large (limit 2^62)"),
    "negative dim": ("%x: bf16[T, 8]) ->", "%x: bf16[T, -8]) ->", 6, 38, "negative dimension -8"),
    "division by zero": ("%x: bf16[T, 8]) ->", "%x: bf16[T, 8 // 0]) ->", 6, 38, "division by zero in a dimension"),
    "results named and given": ("%1, %2 = split", "%1 = split", 14, 5, "split has 2 results, the text names 1"),
    "sizes that do not sum": ("sizes = [5, 3]", "sizes = [5, 4]", 14, 14, "split: sizes [5, 4] do not sum to 8"),
    "negative size": ("sizes = [5, 3]", "sizes = [9, -1]", 14, 14, "split: a result would have the dim -1"),
    "function not above": ("func = layer", "func = other", 13, 10, "repeat: no function @other above this line"),
    "function twice": ("func @main", "func @layer", 12, 9, "function @layer is defined twice"),
    "signature": (") -> bf16[T, 8] {phase", ") -> bf16[T, 4] {phase", 6, 42,
                  "@layer returns bf16[T, 8], its signature says bf16[T, 4]"),
    "type of a weight": ("@w[l: 0..4]: bf16[16, 8]", "@w[l: 0..4]: bf16[8, 16]", 2, 23,
                         "the program of @w returns bf16[16, 8], its type is bf16[8, 16]"),
    "empty index range": ("0..4", "4..4", 2, 20, "empty range 4..4"),
    "op outside a weight program": ("%2 = add %x, %1 :", "%2 = weight.cast %1 {dtype = bf16} :", 9, 10,
                                    "weight.cast cannot stand in a function"),
    "no return": ("    return %2\n", "", 10, 3, "expected 'return' before '}'"),
    "text behind the module": ("  }\n}\n", "  }\n}\nx\n", 18, 1, "text after the end of the module"),
    "unclosed string": ('{l}.w"', "{l}.w", 3, 32, "expected a closed string"),
    "huge integer": ("last = 3", "last = " + "9" * 30, 13, 53, "integer has too many digits"),
    "lists nested deeply": ("[5, 3]", "[" * 12, 14, 40, "lists nested too deeply"),
}  # fmt: skip


def test_the_text_that_the_cases_start_from() -> None:
    assert print_module(parse_module(GOOD)) == GOOD


@pytest.mark.parametrize("name", CASES)
def test_line_column_and_message(name: str) -> None:
    old, new, line, column, message = CASES[name]
    assert GOOD.count(old) == 1, old
    with pytest.raises(ParseError) as caught:
        parse_module(GOOD.replace(old, new), "a.ir")
    first, shown, caret = str(caught.value).split("\n")
    assert first == f"a.ir:{line}:{column}: {message}"
    if column < 90:
        assert shown[2:] == GOOD.replace(old, new).splitlines()[line - 1][: len(shown) - 2]
        assert caret == " " * (column + 1) + "^"


@pytest.mark.parametrize("length", range(0, len(GOOD) - 2, 7))
def test_truncated_text(length: int) -> None:
    """A text that ends early is refused, at a place that exists."""
    text = GOOD[:length]
    with pytest.raises(ParseError) as caught:
        parse_module(text)
    _, line, column, _ = str(caught.value).split(":", 3)
    lines = text.split("\n")
    assert 1 <= int(line) <= len(lines)
    assert 1 <= int(column) <= len(lines[int(line) - 1]) + 1
