"""What a user asks for and what has no effect is told, with its reason; --strict makes it an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from wrong_passes import SMALL

import moec
from moec.cli.options import UsageError, parse_overrides
from moec.ir import Module
from moec.passes import registry
from moec.passes.base import Context, Outcome, Pass
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.manager import StrictError
from moec.passes.mla_absorb import MlaAbsorb
from moec.passes.pipeline import pipeline
from moec.passes.planning.layout import LayoutRequest
from moec.passes.registry import PassSpecError, parse_pass
from moec.targets import load


@pytest.fixture(scope="module")
def traced() -> Any:
    return moec.trace("tiny-deepseek-v3", SMALL)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"passes": ["place-experts"]}, "place-experts: experts lie on one rank: nothing to place"),
        ({"passes": ["shard{via=node}"]}, "shard: the layout has one rank: nothing to shard"),
        ({"passes": ["overlap"]}, "overlap: was asked for and matches nothing: one device: there is no exchange"),
        (
            {"passes": ["split-microbatches"]},
            "split-microbatches: was asked for and matches nothing: @prefill: one dev",
        ),
        (
            {"passes": ["fp8-cast{scale=ue8m0}"], "recipe": "fp32"},
            "fp8-cast: scale=ue8m0 has no effect: recipe fp32 st",
        ),
        ({"layout": LayoutRequest(redundant=4)}, "redundant experts (4) have no effect: all experts lie on one rank"),
        ({"layout": LayoutRequest(pad=True)}, "padding has no effect: TP 1 cuts no width"),
        ({"chunk": 100_000}, "chunk 100000 is more than a step has: 64 tokens taken"),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else "",
)
def test_no_effect_is_told(traced: Any, options: dict[str, Any], warning: str) -> None:
    given = {"context": 64, "chunk": 16, **options}
    plan = traced.optimize("cpu", **given)
    assert [w for w in plan.warnings if w.startswith(warning)], plan.warnings
    with pytest.raises(StrictError, match=r"\(--strict\)$"):
        traced.optimize("cpu", strict=True, **given)


def test_what_was_not_asked_for_is_no_warning(traced: Any) -> None:
    assert not traced.optimize("h800", context=64, chunk=16, strict=True).warnings


def test_options_of_a_pass_keep_its_others() -> None:
    """A recipe beside options of fp8-cast stays, as does what a target's pipeline sets."""
    steps = pipeline(load("cpu"), "fp32", ["fp8-cast{scale=ue8m0}", "mla-absorb{prefill=absorbed}"])
    assert next(s for s in steps if isinstance(s, Fp8Cast)) == Fp8Cast(recipe="fp32", scale="ue8m0")
    assert next(s for s in steps if isinstance(s, MlaAbsorb)) == MlaAbsorb(prefill="absorbed", decode="absorbed")


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("auto", ["fuse", "fuse"], "--pass fuse: the pass is given already, as fuse"),
        ("bf16", ["fp8-cast{recipe=fp32}"], "--recipe bf16 names another recipe: leave one of them away"),
        ("auto", ["fp8-cast{scale=f32,scale=ue8m0}"], "option scale is given twice"),
    ],
)
def test_what_is_given_twice_is_refused(recipe: str, given: list[str], message: str) -> None:
    with pytest.raises(PassSpecError, match=message):
        pipeline(load("cpu"), recipe, given)


@pytest.mark.parametrize("value", ["9" * 5000, "1.5", "", "--1", "x"])
def test_whole_numbers_of_options(value: str) -> None:
    with pytest.raises(PassSpecError, match="option queries must be int"):
        parse_pass(f"mla-absorb{{queries={value}}}")


@pytest.mark.parametrize("value", ["nan", "inf", "-1e999", "x"])
def test_numbers_of_options_are_finite(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Halve(Pass):
        name: ClassVar[str] = "halve"
        by: float = 2.0

        def run(self, module: Module, ctx: Context) -> Outcome:
            return Outcome()

    monkeypatch.setattr(registry, "BUILT_IN", (Halve,))
    assert parse_pass("halve{by=0.5}") == Halve(0.5)
    with pytest.raises(PassSpecError, match="option by must be float"):
        parse_pass(f"halve{{by={value}}}")


def test_a_field_that_is_set_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="--set vocab_size is given twice, as 1 and 2"):
        parse_overrides(["vocab_size=1", "vocab_size=2"])
