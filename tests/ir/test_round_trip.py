"""The text of a module parses back to an equal module, for every preset, phase and stage and for random modules."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from random_modules import modules

import moec
from moec.ir import Location, Module, parse_module, print_module, verify
from moec.ir.diff import diff
from moec.ir.rewrite import clone_module
from moec.model_defs.registry import preset_names
from moec.passes.base import Context, Limits
from moec.passes.laid_out import context_of
from moec.passes.manager import Manager
from moec.passes.pipeline import pipeline
from moec.passes.planning.layout import LayoutRequest
from moec.targets import load


def check(module: Module) -> None:
    text = print_module(module)
    again = parse_module(text)
    assert print_module(again) == text
    assert not diff(module, again)


@pytest.mark.parametrize("target", ["cpu", "h800", "a100"])
@pytest.mark.parametrize("preset", preset_names())
def test_every_stage_of_every_preset(preset: str, target: str) -> None:
    """Imported, and after each pass of the pipeline; both phases stand in one module."""
    traced = moec.trace(preset)
    module = clone_module(traced.ir)
    module.attrs["target"] = target
    context = min(4096, traced.source.config.max_position_embeddings)
    manager = Manager(Context(load(target), Limits(1, context, min(256, context))))
    check(module)
    for step in pipeline(load(target)):
        manager.run(module, [step])
        check(module)
    assert {"prefill", "decode"} <= set(module.functions)


@pytest.mark.parametrize(
    ("preset", "target", "layout"),
    [
        ("deepseek-v3", "h800-ep144", LayoutRequest()),
        ("kimi-k2", "h800-ep144", LayoutRequest(ranks=128, redundant=0)),
        ("deepseek-v2-lite", "h100", LayoutRequest(ranks=8, tp=2, pad=True)),
        ("tiny-deepseek-v3", "cpu", LayoutRequest(ranks=4, pp=2)),
    ],
)
def test_every_stage_over_several_ranks(preset: str, target: str, layout: LayoutRequest) -> None:
    """Sharded, split into micro-batches and scheduled with streams, events and buffers."""
    module = moec.trace(preset).ir
    context = context_of(module, load(target), Limits(64, 1024, 1024), layout)
    assert context.layout is not None
    manager = Manager(context)
    for step in pipeline(context.target, ranks=context.layout.ranks):
        manager.run(module, [step])
        check(module)
    assert ("event.wait" in print_module(module)) == (context.target.kind != "cpu")


def test_a_module_that_drafts() -> None:
    check(moec.trace("tiny-deepseek-v3", mtp=True).optimize("cpu", context=64, chunk=16).ir)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(modules())
def test_random_modules(module: Module) -> None:
    """Random ops of the op table on random types: dims, scales, layouts, shardings, attributes of every kind."""
    verify(module)
    check(module)


@pytest.mark.parametrize(
    "value",
    ["", "true", "true-x", "inf", "inf.x", "nan-1", "loc", "loc(a:1)", "1x128", "1x", "12", "-", 'a"b', "a\\b", "a\nb",
     "é", "\u2028", "\ud800", "a b", "{l}", "//", "a.b-c_d", "_", "T*8", "0x10y"],
)  # fmt: skip
def test_strings_in_attributes(value: str) -> None:
    module = Module("m", {"key": value, "list": (value, (value,), ())})
    again = parse_module(print_module(module))
    assert again.attrs == module.attrs


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-300, 5e-324, 1.7976931348623157e308, 1e22, float("inf"), 0.1, -1e-7])
def test_floats_in_attributes(value: float) -> None:
    again = parse_module(print_module(Module("m", {"key": value})))
    assert repr(again.attrs["key"]) == repr(value)


def test_locations_of_oddly_named_files() -> None:
    """Characters that would end the location are replaced when the location is made."""
    assert str(Location("my model (1), new.py", 3, ("fuse",))) == "loc(my model _1__ new.py:3, fuse)"


def test_names_of_modules_may_begin_with_a_digit() -> None:
    check(Module("7b_chat"))


def test_integers_of_nineteen_digits_keep_their_sign() -> None:
    text = "module @m {version = 1, least = -4611686018427387904, greatest = 4611686018427387904} {\n}\n"
    assert print_module(parse_module(text)) == text
