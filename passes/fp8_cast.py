"""fp8-cast: give weights, inputs of products, activations and cache the element types of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import near
from moec.ir import CacheType, Function, Module, Op, TensorType, Value, Weight, WeightRef
from moec.ir.rewrite import append_to_program, fresh_names, retype
from moec.ir.types import SCALE_BITS
from moec.passes import recipe as recipes
from moec.passes.base import Context, Edit, Outcome, Pass, PassError
from moec.passes.recipe import Element, Recipe
from moec.targets import Target

PRODUCTS = ("linear", "linear.heads", "moe.experts")
BIASES = (("linear", 2), ("moe.route", 2), ("moe.experts", 4), ("moe.experts", 5), ("norm.layer", 2), ("attn.heads", 6))
"""Ops and operand positions of vectors that are added; sinks are added to the scores' sum."""
EXACT = ("norm.rms", "norm.add_rms", "norm.layer", "bias", "moe.route")
"""Kinds of use whose weights are small and that CPU kernels read in FP32."""
TABLES = ("repeat", "rope")
"""Ops whose weights are tables that no recipe touches."""


@dataclass(frozen=True)
class Fp8Cast(Pass):
    """Apply a precision recipe.

    Consumes a module whose weights and activations have the checkpoint's types; produces one whose weights, activations
    and cache have the recipe's types, with a `quant.cast` before every product (through the dispatch for experts) whose
    input the recipe quantises. `scale` names another scale format than the recipe's: it is chosen before quantising.
    Results change by the formats' rounding.
    """

    name: ClassVar[str] = "fp8-cast"
    tolerance: ClassVar[float] = 0.2
    recipe: str = "auto"
    scale: str = "auto"

    def requires(self, module: Module) -> str:
        for weight in module.weights.values():
            if isinstance(weight.type, TensorType) and (weight.type.quant or weight.type.layout):
                return f"@{weight.name} is {weight.type} already: weights are cast once, before they are packed"
        return ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        recipe = self._recipe(ctx.target, out)
        kinds = dict(weight_kinds(module))
        fitted: dict[str, int] = {}
        for weight in module.weights.values():
            kind = kinds.get(weight.name, "")
            rule = recipe.rule(kind, weight.name) if kind else None
            if rule is None:
                continue
            fitted[str(rule)] = fitted.get(str(rule), 0) + 1
            before = weight.type
            cast(weight, _for_kernels(rule.weight, kind, ctx.target))
            out.matched += before != weight.type
        self._check(recipe, fitted, list(kinds), out)
        activations = "f32" if ctx.target.kind == "cpu" else recipe.activations
        casts = sum(_cast_inputs(module, function, recipe, activations) for function in module.functions.values())
        _set_activations(module, activations, recipe.cache)
        retype(module)
        out.matched += casts
        if not out.matched:
            out.warnings.append(f"every weight has the types of recipe {recipe.name} already")
        module.attrs["recipe"] = recipe.name
        out.notes.append(_summary(recipe, kinds, activations, casts))
        return out

    def _recipe(self, target: Target, out: Outcome) -> Recipe:
        """The recipe as the target can run it; what differs from the one asked for is noted."""
        if self.scale not in ("auto", *SCALE_BITS):
            raise PassError(
                name=self.name, message=f"unknown scale format {self.scale!r}{near(self.scale, list(SCALE_BITS))}"
            )
        recipe = recipes.load(auto_recipe(target) if self.recipe == "auto" else self.recipe)
        fp8 = target.device.fp8
        if self.scale != "auto":
            if not any(r.weight.quant for r in recipe.rules):
                out.warnings.append(f"scale={self.scale} has no effect: recipe {recipe.name} stores no scaled matrices")
            recipe = recipe.scaled_by(self.scale)
        elif fp8.matrix and recipe.scale_formats - set(fp8.scale_formats):
            wanted = fp8.scale_formats[0]
            out.notes.append(f"scales are {wanted}: {target.name} multiplies no {', '.join(recipe.scale_formats)}")
            recipe = recipe.scaled_by(wanted)
        if recipe.scale_formats and not fp8.matrix and target.kind != "cpu":
            out.notes.append(
                f"{target.name} has no FP8 matrix units: weights stay in FP8 and are widened, activations are "
                f"{recipe.activations} (recipe {recipe.name} would quantise them)"
            )
            recipe = recipe.without_inputs()
        return recipe

    def _check(self, recipe: Recipe, fitted: dict[str, int], weights: list[str], out: Outcome) -> None:
        """Refuse a recipe without any effect; name rules without one."""
        if weights and not fitted:
            rules = "; ".join(map(str, recipe.rules))
            message = f"recipe {recipe.name} names no weight of {len(weights)} (rules: {rules}); for example "
            raise PassError(name=self.name, message=message + ", ".join(sorted(weights)[:4]))
        if self.recipe.endswith((".yaml", ".yml")):
            idle = [str(r) for r in recipe.rules if str(r) not in fitted]
            out.warnings += [f"recipe {recipe.name}: rule {r} decides no weight" for r in idle]


def auto_recipe(target: Target) -> str:
    """The best recipe that a target supports: FP8 products where it has units for them."""
    return "deepseek-v3" if target.device.fp8.matrix else "weight-only"


def cast(weight: Weight, to: Element) -> None:
    """Append to a weight's program what gives it type `to`."""
    assert isinstance(weight.type, TensorType)
    if to.quant is not None:
        append_to_program(weight, "weight.quantise", dtype=to.dtype, granularity=to.granularity, scale=to.quant.scale)
    elif weight.type.dtype != to.dtype:
        append_to_program(weight, "weight.cast", dtype=to.dtype)


def _for_kernels(element: Element, kind: str, target: Target) -> Element:
    """CPU kernels read gate, norms and biases in FP32."""
    return Element("f32") if kind in EXACT and target.kind == "cpu" else element


def weight_kinds(module: Module) -> Iterator[tuple[str, str]]:
    """Each weight with the kind of its first use: op name, `head` (the product that an entry returns) or `bias`."""
    seen: set[str] = set()
    for function, op in module.ops():
        for position, operand in enumerate(op.operands):
            if isinstance(operand, WeightRef) and operand.name not in seen and op.name not in TABLES:
                seen.add(operand.name)
                yield operand.name, _kind(function, op, position)


def _kind(function: Function, op: Op, position: int) -> str:
    if (op.name, position) in BIASES:
        return "bias"
    if op.name == "linear" and op.result in function.returns and str(function.attrs.get("phase")) == function.name:
        return "head"
    return op.name


def weight_roles(module: Module) -> dict[str, str]:
    """What each weight is to the ops that use it: `matrix`, `embedding`, or `exact` (norm, bias, gate, table)."""
    roles = {"embed": "embedding", "head": "matrix", **dict.fromkeys(PRODUCTS, "matrix")}
    return {name: roles.get(kind, "exact") for name, kind in weight_kinds(module)}


def _cast_inputs(module: Module, function: Function, recipe: Recipe, activations: str) -> int:
    """Quantise what products read, once for each value; returns how many casts were inserted.

    A product of quantised rows gives bf16 unless it says otherwise.
    """
    edit = Edit(module, function, Fp8Cast.name)
    made: dict[tuple[Value, str], Value] = {}
    producer = function.producer()
    kinds = dict(weight_kinds(module))
    for op in list(function.ops):
        ref = next((o for o in op.operands if isinstance(o, WeightRef)), None) if op.name in PRODUCTS else None
        rule = recipe.rule(kinds[ref.name], ref.name) if ref is not None else None
        if rule is None or rule.input is None or rule.input.quant is None:
            continue
        source, reader = op.operands[0], op
        while isinstance(source, Value) and source in producer and producer[source].name == "moe.dispatch":
            reader = producer[source]
            source = reader.operands[0]
        if not isinstance(source, Value):
            continue
        key = (source, str(rule.input))
        if key not in made:
            attrs = {
                "dtype": rule.input.dtype,
                "granularity": rule.input.granularity,
                "scale": rule.input.quant.scale,
            }
            (made[key],) = edit.insert(_first_reader(function, source), "quant.cast", source, attrs=attrs)
        reader.operands[0] = made[key]
        if activations != "bf16":
            op.attrs.setdefault("out", activations)
    fresh_names(function)
    return len(made)


def _first_reader(function: Function, value: Value) -> Op:
    return next(op for op in function.ops if value in op.values())


def _set_activations(module: Module, dtype: str, cache: Element) -> None:
    for function in module.functions.values():
        for arg in function.args:
            if isinstance(arg.type, CacheType):
                arg.type = CacheType(arg.type.kind, arg.type.shape, cache.dtype)
    for _, op in module.ops():
        if op.name in ("embed", "cache.read") or op.attrs.get("carries") == "activations":
            op.attrs["dtype"] = dtype
        elif op.name == "repeat":
            # Layers are typed before their callers: the residual stream's type must stand.
            x = module.functions[str(op.attrs["func"])].args[1]
            assert isinstance(x.type, TensorType)
            x.type = x.type.with_dtype(dtype)


def _summary(recipe: Recipe, kinds: dict[str, str], activations: str, casts: int) -> str:
    stored: dict[str, None] = {}
    for name, kind in kinds.items():
        rule = recipe.rule(kind, name)
        if rule is not None and kind in PRODUCTS:
            stored[str(rule.weight)] = None
    inputs = f", {casts} inputs of products quantised" if casts else ""
    return (
        f"recipe {recipe.name}: matrices {' and '.join(stored) or 'as they are'}, activations {activations}{inputs}, "
        f"cache {recipe.cache}"
    )
