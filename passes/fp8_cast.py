"""fp8-cast: give weights, activations and cache the element types of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import near
from moec.ir import CacheType, Module, TensorType, Weight, WeightRef
from moec.ir.rewrite import append_to_program, retype
from moec.ir.types import SCALE_BITS
from moec.passes.base import Context, Outcome, Pass, PassError

BLOCK = "128x128"


@dataclass(frozen=True)
class Recipe:
    """Element types: of matrices, of the embedding, of activations, of the cache; vectors and the gate stay f32."""

    matrices: str
    embedding: str
    activations: str
    cache: str


RECIPES = {
    "fp32": Recipe("f32", "f32", "f32", "f32"),
    "bf16": Recipe("bf16", "bf16", "f32", "bf16"),
    "weight-only": Recipe("fp8_e4m3", "bf16", "f32", "bf16"),
}
"""Recipes for devices that widen weights in registers and compute in FP32."""


def auto_recipe(ctx: Context) -> str:
    """The best recipe that the target supports, when the user names none."""
    return "weight-only" if ctx.target.kind == "cpu" else "bf16"


@dataclass(frozen=True)
class Fp8Cast(Pass):
    """Apply a precision recipe.

    Consumes a module whose weights and activations have the checkpoint's types; produces one whose matrices are stored
    as the recipe says (FP8: E4M3 with one `scale` per 128x128 block, output head included), whose norms, biases and
    gate are f32, and whose activations and cache have the recipe's types. Results change by the formats' rounding.
    """

    name: ClassVar[str] = "fp8-cast"
    tolerance: ClassVar[float] = 0.2
    recipe: str = "auto"
    scale: str = "f32"

    def requires(self, module: Module) -> str:
        for weight in module.weights.values():
            if isinstance(weight.type, TensorType) and (weight.type.quant or weight.type.layout):
                return f"@{weight.name} is {weight.type} already: weights are cast once, before they are packed"
        return ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        if self.scale not in SCALE_BITS:
            raise PassError(
                name=self.name, message=f"unknown scale format {self.scale!r}{near(self.scale, list(SCALE_BITS))}"
            )
        name = auto_recipe(ctx) if self.recipe == "auto" else self.recipe
        if name not in RECIPES:
            raise PassError(name=self.name, message=f"unknown recipe {name!r}{near(name, list(RECIPES))}")
        recipe = RECIPES[name]
        if ctx.target.kind != "cpu" and recipe.activations == "f32" and name != "fp32":
            # Matrix units take 16-bit operands and accumulate in FP32.
            recipe = replace(recipe, activations="bf16")
        out = Outcome()
        roles = weight_roles(module)
        for weight in module.weights.values():
            before = weight.type
            role = roles.get(weight.name, "matrix")
            self._cast(weight, {"matrix": recipe.matrices, "embedding": recipe.embedding}.get(role, "f32"))
            out.matched += before != weight.type
        if not recipe.matrices.startswith("fp8") and self.scale != "f32":
            out.warnings.append(f"scale={self.scale} has no effect: recipe {name} stores no scaled matrices")
        if not out.matched:
            out.warnings.append(f"every weight has the types of recipe {name} already")
        _set_activations(module, recipe)
        retype(module)
        module.attrs["recipe"] = name
        out.notes.append(
            f"recipe {name}: matrices {recipe.matrices}, activations {recipe.activations}, cache {recipe.cache}"
        )
        return out

    def _cast(self, weight: Weight, dtype: str) -> None:
        assert isinstance(weight.type, TensorType)
        if dtype.startswith("fp8"):
            append_to_program(weight, "weight.quantise", dtype=dtype, granularity=BLOCK, scale=self.scale)
        elif weight.type.dtype != dtype:
            append_to_program(weight, "weight.cast", dtype=dtype)


def weight_roles(module: Module) -> dict[str, str]:
    """What each weight is to the ops that use it: `matrix`, `embedding`, or `exact` (norm, bias, gate, table)."""
    roles: dict[str, str] = {}
    for _, op in module.ops():
        for position, operand in enumerate(op.operands):
            if not isinstance(operand, WeightRef):
                continue
            role = "exact"
            if op.name == "embed":
                role = "embedding"
            elif (op.name in ("linear", "linear.heads") and position == 1) or op.name == "moe.experts":
                role = "matrix"
            roles[operand.name] = role
    return roles


def _set_activations(module: Module, recipe: Recipe) -> None:
    for function in module.functions.values():
        for arg in function.args:
            if isinstance(arg.type, CacheType):
                arg.type = CacheType(arg.type.kind, arg.type.shape, recipe.cache)
    for _, op in module.ops():
        if op.name in ("embed", "cache.read"):
            op.attrs["dtype"] = recipe.activations
