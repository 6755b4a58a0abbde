"""Modules compared by structure."""

from __future__ import annotations

import re

from parser_texts import GOOD

import moec
from moec.ir import Module, parse_module
from moec.ir.diff import diff
from moec.ir.rewrite import clone_module


def changed(old: str, new: str) -> list[str]:
    assert old in GOOD
    return [str(c) for c in diff(parse_module(GOOD), parse_module(GOOD.replace(old, new)))]


def test_names_of_values_and_locations_are_no_difference() -> None:
    renamed = re.sub(r"loc\(.*?\)", "", GOOD).replace("%0", "%first").replace("%x", "%y")
    assert [c.what for c in diff(parse_module(GOOD), parse_module(renamed)) if "arguments" not in c.what] == []


def test_one_attribute_is_one_change() -> None:
    assert changed("sizes = [5, 3]} : bf16[T, 5], bf16[T, 3]", "sizes = [3, 5]} : bf16[T, 3], bf16[T, 5]") == [
        "~ @main: %1, %2 = split %0 {sizes = [5, 3]} : bf16[T, 5], bf16[T, 3] -> "
        "%1, %2 = split %0 {sizes = [3, 5]} : bf16[T, 3], bf16[T, 5]"
    ]


def test_an_op_more_is_one_change_wherever_it_stands() -> None:
    more = "%2 = add %x, %1 : bf16[T, 8]\n    %3 = add %1, %1 : bf16[T, 8]"
    assert changed("%2 = add %x, %1 : bf16[T, 8]", more) == ["+ @layer: %3 = add %1, %1 : bf16[T, 8]"]


def test_exchanged_operands_are_a_change() -> None:
    assert changed("add %x, %1", "add %1, %x") == [
        "~ @layer: %2 = add %x, %1 : bf16[T, 8] -> %2 = add %1, %x : bf16[T, 8]"
    ]


def test_another_return_is_a_change() -> None:
    assert changed("return %2", "return %1")[-1] == "~ @layer: return %2 -> %1"


def _fused() -> tuple[Module, Module]:
    from moec.passes.base import Context
    from moec.passes.fuse import Fuse
    from moec.targets import load

    before = moec.trace("tiny-deepseek-v3").ir
    after = clone_module(before)
    Fuse().run(after, Context(load("cpu")))
    return before, after


def test_a_fusion_is_told_as_what_it_did() -> None:
    """Ops that a pass left alone are not listed, although every value got another number."""
    found = [str(c) for c in diff(*_fused()) if c.where == "@dense_layers.prefill"]
    assert {c.split(" = ")[1].split(" ")[0] for c in found if c[0] == "-"} == {"linear", "norm.rms", "add"}
    assert {c.split(" = ")[1].split(" ")[0] for c in found if c[0] == "+"} == {"linear", "split", "norm.add_rms"}
    assert len(found) <= 8
