"""Precision recipes: what they do to the IR, and files that a user writes."""

from __future__ import annotations

from pathlib import Path

import pytest

import moec
from moec import targets
from moec.errors import MoecError
from moec.ir import Module
from moec.ir.rewrite import clone_module
from moec.passes import recipe as recipes
from moec.passes.base import Context, Limits, Outcome, PassError
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.mla_absorb import MlaAbsorb


@pytest.fixture(scope="module")
def deepseek() -> Module:
    return moec.trace("deepseek-v3").ir


def cast(module: Module, target: str, **options: str) -> tuple[Module, Outcome]:
    module = clone_module(module)
    ctx = Context(targets.load(target), Limits(batch=128))
    MlaAbsorb().run(module, ctx)
    return module, Fp8Cast(**options).run(module, ctx)


def test_auto_follows_the_target(deepseek: Module) -> None:
    assert cast(deepseek, "h800")[0].attrs["recipe"] == "deepseek-v3"
    assert cast(deepseek, "cpu")[0].attrs["recipe"] == "weight-only"


def test_the_published_recipe(deepseek: Module) -> None:
    """Products read 1x128 activations; embedding, head, gate, norms and attention stay in BF16; dispatch is FP8."""
    module, _ = cast(deepseek, "h800")
    weights = {n: str(w.type) for n, w in module.weights.items()}
    assert weights["head"] == "bf16[129280, 7168]" and weights["embed"] == "bf16[129280, 7168]"
    assert weights["moe_layers.mlp.gate"] == "bf16[256, 7168]"
    assert weights["moe_layers.mlp.experts_down"] == "fp8_e4m3[7168, 2048] scale(f32, 128x128)"
    # The absorbed form reads what the plain form reads, widened.
    assert weights["moe_layers.attn.kv_b.k"] == "fp8_e4m3[128, 512, 128] scale(f32, 128x128)"
    assert {
        str(op.operands[0].type) for op in module.functions["moe_layers.decode"].ops if op.name == "linear.heads"
    } == {
        "bf16[T, 128, 128]",
        "bf16[T, 128, 512]",
    }
    ops = list(module.functions["moe_layers.decode"].ops)
    by_name = {op.name: op for op in ops}
    assert str(by_name["moe.dispatch"].results[0].type) == "fp8_e4m3[T*8, 7168] scale(f32, 1x128)"
    assert str(by_name["moe.combine"].operands[0].type) == "bf16[T*8, 7168]"
    linears = [op for op in ops if op.name == "linear"]
    assert all(op.operands[0].type.quant for op in linears)  # type: ignore[union-attr]
    assert not by_name["moe.route"].operands[0].type.quant  # type: ignore[union-attr]
    # One cast serves the dispatch and the shared expert.
    assert sum(op.name == "quant.cast" for op in ops) == 5


def test_scales_that_the_target_multiplies(deepseek: Module) -> None:
    module, outcome = cast(deepseek, "b200")
    assert str(module.weights["dense_layers.mlp.down"].type).endswith("scale(ue8m0, 128x128)")
    assert any("scales are ue8m0: b200" in n for n in outcome.notes)
    module, _ = cast(deepseek, "h800", scale="ue8m0")
    assert str(module.weights["dense_layers.mlp.down"].type).endswith("scale(ue8m0, 128x128)")


def test_a_target_without_fp8_says_what_it_does_instead(deepseek: Module) -> None:
    module, outcome = cast(deepseek, "a100", recipe="deepseek-v3")
    assert not any(op.name == "quant.cast" for _, op in module.ops())
    assert [n for n in outcome.warnings if "a100 has no FP8 matrix units: weights stay in FP8" in n]
    _, outcome = cast(deepseek, "a100")
    assert not outcome.warnings, "where nothing was named, what is done is no fallback"
    assert [n for n in outcome.notes if "a100 has no FP8 matrix units" in n]


def test_a_file(deepseek: Module, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "rules:\n  - {name: '*.shared.*', weight: bf16}\n"
        "  - {op: moe.experts, weight: 'fp8_e4m3 scale(ue8m0, 128x128)'}\n  - {name: 'nothing', weight: f32}\n"
    )
    module, outcome = cast(deepseek, "cpu", recipe=str(file))
    assert str(module.weights["moe_layers.mlp.experts_down"].type) == "fp8_e4m3[7168, 2048] scale(ue8m0, 128x128)"
    assert module.attrs["recipe"] == "mine"
    assert outcome.warnings == ["recipe mine: rule * nothing decides no weight"]


def test_a_recipe_that_names_no_weight(deepseek: Module, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rules:\n  - {name: 'experts.*', weight: bf16}\n")
    with pytest.raises(PassError, match=r"recipe mine names no weight of \d+ \(rules: \* experts\.\*\); for example "):
        cast(deepseek, "cpu", recipe=str(file))


WRONG = {
    "rules: 3": "rules must be a list",
    "[": "is not YAML",
    "rules: [{op: linear, weight: fp7}]": "rules[0].weight: unknown type fp7",
    "rules: [{op: linear, weight: 'fp8_e4m3 scale(f23, 1x128)'}]": "unknown scale format f23",
    "rules: [{op: linear, weight: fp8_e4m3}]": "fp8_e4m3 needs a scale",
    "rules: [{op: linear, weight: 'bf16 scale(f32, 1x128)'}]": "bf16 takes no scale",
    "rules: [{weight: bf16}]": "rules[0] names no weight",
    "rules: [{op: linear}]": "rules[0] gives no weight: a type such as bf16",
    "rules: [linear]": "rules[0] must be a mapping with weight",
    "rules: [{op: 'linaer*', weight: bf16}]": "no use of a weight is called linaer*",
    "rules: [{op: linear, wieght: bf16, weight: bf16}]": "unknown field wieght (did you mean weight?)",
    "rules: [{op: 3, weight: bf16}]": "op and name are globs",
    "{rules: [{op: linear, weight: bf16}], activation: bf16}": "unknown field activation (did you mean activations?)",
    "{rules: [{op: linear, weight: bf16}], activations: i32}": "activations: i32 is no type for weights",
    "rules: [{op: linear, weight: bf16, input: 'fp8_e4m3 scale(f32, 1x128)'}]": "a quantised input needs scaled types",
    "rules: [{op: linear, weight: 'fp8_e4m3 scale(f32, 0x0)', input: 'fp8_e4m3 scale(ue8m0, 1x0)'}]": "ue8m0 and f32",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(MoecError) as caught:
        recipes.load(str(file))
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_unknown_names() -> None:
    with pytest.raises(recipes.UnknownRecipe, match=r"did you mean deepseek-v3"):
        recipes.load("deepseek-v33")
    with pytest.raises(recipes.RecipeError, match="No such file"):
        recipes.load("missing.yaml")
