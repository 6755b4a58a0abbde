"""fp8-cast: give weights, inputs of products, activations and cache the element types of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import near
from moec.ir import ENTRIES, CacheType, Function, Module, Op, TensorType, Value, Weight, WeightRef
from moec.ir.accumulate import ATTRIBUTE, PROMOTED
from moec.ir.module import Operand
from moec.ir.rewrite import fresh_names, retype
from moec.ir.types import SCALE_BITS, Quant
from moec.passes import recipe as recipes
from moec.passes.base import Context, Edit, Outcome, Pass, PassError
from moec.passes.casting import cast, follow_columns, widen_cut_blocks
from moec.passes.recipe import Element, Recipe
from moec.passes.widening import choose
from moec.targets import Target

PRODUCTS = ("linear", "linear.heads", "moe.experts")
BIASES = (("linear", 2), ("moe.route", 2), ("moe.experts", 4), ("moe.experts", 5), ("norm.layer", 2), ("attn.heads", 6))
"""Ops and operand positions of vectors that are added; sinks are added to the scores' sum."""
EXACT = ("norm.rms", "norm.add_rms", "norm.layer", "bias", "moe.route", "gate")
"""Kinds of use whose weights are small and that CPU kernels read in FP32."""
GATED = ("gate.rows", "attn.index")
"""Ops whose second operand weighs the first: the product that makes it stays exact."""
DISPATCH = {"moe.dispatch": 0, "comm.dispatch": 1}
"""Ops that send rows to experts, with the operand that holds the rows."""
COMBINE = ("moe.combine", "comm.combine")
TABLES = ("repeat", "rope")
"""Ops whose weights are tables that no recipe touches."""


@dataclass(frozen=True)
class Fp8Cast(Pass):
    """Apply a precision recipe.

    Consumes a module whose weights and activations have the checkpoint's types; produces one whose weights, activations
    and cache have the recipe's types, with a `quant.cast` before every product (through the dispatch for experts) whose
    input the recipe quantises. `scale` names another scale format than the recipe's: it is chosen before quantising.
    `cache` (bf16, f32, fp8) and `combine` (bf16, fp8, logfmt10) stand in place of the recipe's. Results change by the
    formats' rounding.
    """

    name: ClassVar[str] = "fp8-cast"
    tolerance: ClassVar[float] = 0.2
    recipe: str = "auto"
    scale: str = "auto"
    cache: str = "recipe"
    combine: str = "recipe"

    def requires(self, module: Module) -> str:
        for weight in module.weights.values():
            if isinstance(weight.type, TensorType) and weight.type.layout:
                return f"@{weight.name} is {weight.type} already: weights are cast before they are packed"
        return ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        recipe = self._recipe(module, ctx, out)
        kinds = dict(weight_kinds(module))
        fitted: dict[str, int] = {}
        for weight in module.weights.values():
            kind = kinds.get(weight.name, "")
            rule = recipe.rule(kind, weight.name) if kind else None
            if rule is None:
                continue
            fitted[str(rule)] = fitted.get(str(rule), 0) + 1
            before = weight.type
            to = _for_kernels(rule.weight, kind, ctx.target)
            self._check_rank(weight, to, kind, str(rule))
            changed = cast(weight, to, keep=self.recipe == "auto")
            if ctx.target.kind == "cpu" and kind in PRODUCTS:
                changed = follow_columns(weight) or changed
            elif kind == "linear.heads":
                changed = widen_cut_blocks(weight) or changed
            if changed:
                out.notes.append(f"@{weight.name}: {changed}")
            out.matched += before != weight.type
        self._check(recipe, fitted, list(kinds), out)
        activations = "f32" if ctx.target.kind == "cpu" else recipe.activations
        casts = sum(_cast_inputs(module, function, recipe, activations) for function in module.functions.values())
        casts += sum(_cast_combine(module, f, recipe.combine, activations) for f in module.functions.values())
        if recipe.combine.quant is not None:
            out.notes.append(_combine_note(module, recipe.combine, ctx.target))
        _set_activations(module, activations, self._cache_type(module, recipe))
        retype(module)
        out.matched += casts
        if not out.matched:
            out.warnings.append(f"every weight has the types of recipe {recipe.name} already")
        module.attrs["recipe"] = recipe.name
        fp8 = ctx.target.device.fp8
        if casts and fp8.matrix and fp8.accumulate_bits < 32:
            module.attrs[ATTRIBUTE] = fp8.accumulate_bits
            bits = f"{fp8.accumulate_bits} bits, promoted to FP32 every {PROMOTED}"
            out.notes.append(f"{ctx.target.name} sums FP8 products in {bits}: the reference evaluator follows")
        out.notes.append(_summary(recipe, kinds, activations, casts))
        return out

    def ensures(self, module: Module) -> str:
        """Every weight has the element type that the recipe gives it: rounding alone would not show a wrong one."""
        name = str(module.attrs["recipe"])
        recipe = recipes.load(self.recipe if self.recipe.endswith((".yaml", ".yml")) else name)
        for weight, kind in weight_kinds(module):
            rule, has = recipe.rule(kind, weight), module.weights[weight].type
            assert isinstance(has, TensorType)
            # See `casting.widen_cut_blocks`.
            other = "f32" if kind in EXACT else "bf16" if kind == "linear.heads" else ""
            wanted = {rule.weight.dtype, *([other] if other else [])} if rule else {recipes.KEPT}
            if recipes.KEPT not in wanted and has.dtype not in wanted:
                return f"@{weight} is {has}, recipe {recipe.name} wants {' or '.join(sorted(wanted))} for {kind}"
        return ""

    def _recipe(self, module: Module, ctx: Context, out: Outcome) -> Recipe:
        """The recipe as the target can run it; what differs from the one asked for is noted."""
        if self.scale not in ("auto", *SCALE_BITS):
            raise PassError(
                name=self.name, message=f"unknown scale format {self.scale!r}{near(self.scale, list(SCALE_BITS))}"
            )
        target, own = ctx.target, checkpoint_quantisation(module)
        recipe = recipes.load(auto_recipe(target, own) if self.recipe == "auto" else self.recipe)
        recipe = replace(
            recipe,
            cache=self._short("cache", self.cache, recipes.CACHE) or recipe.cache,
            combine=self._short("combine", self.combine, recipes.COMBINE) or recipe.combine,
        )
        fp8 = target.device.fp8
        if self.scale != "auto":
            if not any(r.weight.quant for r in recipe.rules):
                out.warnings.append(f"scale={self.scale} has no effect: recipe {recipe.name} stores no scaled matrices")
            recipe = recipe.scaled_by(self.scale)
        elif self.recipe == "auto" and own is not None and own.scale not in recipe.scale_formats | {"f32"}:
            out.notes.append(f"scales are {own.scale}, as the checkpoint holds them")
            recipe = recipe.scaled_by(own.scale)
        elif fp8.matrix and recipe.scale_formats - set(fp8.scale_formats):
            wanted = fp8.scale_formats[0]
            self._told(out).append(
                f"scales are {wanted}: {target.name} multiplies no {', '.join(sorted(recipe.scale_formats))}"
            )
            recipe = recipe.scaled_by(wanted)
        if fp8.matrix:
            return recipe
        if target.kind == "cpu":
            if recipe.scale_formats:
                text = f"{target.name} has no FP8 matrix units: activations are rounded to FP8 and widened"
                self._told(out).append(text)
            return recipe
        return self._widened(module, ctx, recipe, out)

    def _told(self, out: Outcome) -> list[str]:
        """Where a fallback is told: it is a warning where the recipe was named, what `auto` means where not."""
        return out.notes if self.recipe == "auto" else out.warnings

    def _widened(self, module: Module, ctx: Context, recipe: Recipe, out: Outcome) -> Recipe:
        """What a GPU without FP8 products does: FP8 weights that are widened, or BF16, whichever costs less."""
        if not (recipe.scale_formats or self.recipe == "auto"):
            return recipe
        best, reason = choose(module, ctx)
        kept = "weights stay in FP8 and are widened to BF16" if best == "weight-only" else "weights are held in BF16"
        self._told(out).append(f"{ctx.target.name} has no FP8 matrix units: {kept}; {reason}")
        if best == "bf16":
            return replace(recipes.load("bf16"), cache=recipe.cache, combine=recipe.combine)
        return recipe.without_inputs()

    def _short(self, option: str, value: str, known: Mapping[str, str]) -> Element | None:
        if value == "recipe":
            return None
        if value not in known:
            raise PassError(name=self.name, message=f"unknown {option} {value!r}{near(value, list(known))}")
        return recipes.short(known, value)

    def _cache_type(self, module: Module, recipe: Recipe) -> tuple[Element, int]:
        """The element of the cache, and the width of the rotary key that an FP8 cache keeps in BF16."""
        if recipe.cache.quant is None:
            return recipe.cache, 0
        block = recipe.cache.quant.block[-1]
        append = next((op for _, op in module.ops() if op.name == "cache.append"), None)
        if any(op.name == "cache.append_index" for _, op in module.ops()):
            message = "a cache with index keys has no FP8 layout: keep it in bf16 (fp8-cast{cache=bf16})"
            raise PassError(name=self.name, message=message)
        if append is None or (recipe.cache.dtype, recipe.cache.quant.block) != ("fp8_e4m3", (1, 128)):
            message = f"a cache of {recipe.cache} has no layout: want fp8_e4m3 scale(f32, 1x128) for a latent, or bf16"
            raise PassError(name=self.name, message=message)
        rank, rope = (_width(append.operands[i]) for i in (2, 3))
        if rank % block:
            padded = -(-rank // block) * block
            raise PassError(
                name=self.name,
                message=f"an FP8 cache has a scale for each {block} of the latent: kv_lora_rank {rank} is no multiple "
                f"({padded} would be); keep the cache in bf16 (fp8-cast{{cache=bf16}})",
            )
        return recipe.cache, rope

    def _check_rank(self, weight: Weight, to: Element, kind: str, rule: str) -> None:
        """Refuse blocks of a matrix for a vector."""
        t = weight.type
        assert isinstance(t, TensorType)
        if to.quant is not None and len(to.quant.block) > len(t.shape):
            message = f"rule {rule} gives @{weight.name}, a vector of {t.shape[0]}, blocks of {to.granularity}: "
            message += f"let a rule before it decide, such as {{op: {kind}, weight: bf16}}"
            raise PassError(name=self.name, message=message)

    def _check(self, recipe: Recipe, fitted: dict[str, int], weights: list[str], out: Outcome) -> None:
        """Refuse a recipe without any effect; name rules without one."""
        if weights and not fitted:
            rules = "; ".join(map(str, recipe.rules))
            message = f"recipe {recipe.name} names no weight of {len(weights)} (rules: {rules}); for example "
            raise PassError(name=self.name, message=message + ", ".join(sorted(weights)[:4]))
        if self.recipe.endswith((".yaml", ".yml")):
            idle = [str(r) for r in recipe.rules if str(r) not in fitted]
            out.warnings += [f"recipe {recipe.name}: rule {r} decides no weight" for r in idle]


def auto_recipe(target: Target, own: Quant | None = None) -> str:
    """The best recipe that a target supports: FP8 products where it has units for them, in the checkpoint's form."""
    if not target.device.fp8.matrix:
        return "checkpoint" if own else "weight-only"
    blocks: dict[tuple[int, ...], str] = {(0, 0): "per-tensor", (1, 0): "per-channel"}
    return blocks.get(own.block, "deepseek-v3") if own else "deepseek-v3"


def checkpoint_quantisation(module: Module) -> Quant | None:
    """How a checkpoint in FP8 holds its matrices; None for one that does not."""
    types = (w.type for w in module.weights.values())
    return next((t.quant for t in types if isinstance(t, TensorType) and t.quant), None)


def _for_kernels(element: Element, kind: str, target: Target) -> Element:
    """CPU kernels read gate, norms and biases in FP32."""
    return Element("f32") if kind in EXACT and target.kind == "cpu" else element


def weight_kinds(module: Module) -> Iterator[tuple[str, str]]:
    """Each weight with the kind of its first use: op name, `head` (what an entry returns), `bias` or `gate`."""
    seen: set[str] = set()
    for function, op in module.ops():
        for position, operand in enumerate(op.operands):
            if isinstance(operand, WeightRef) and operand.name not in seen and op.name not in TABLES:
                seen.add(operand.name)
                yield operand.name, _kind(function, op, position)


def _kind(function: Function, op: Op, position: int) -> str:
    if (op.name, position) in BIASES:
        return "bias"
    if op.name == "linear" and op.result in function.returns and function.name in ENTRIES:
        return "head"
    if op.name == "linear" and any(u.name in GATED and u.operands[1] is op.result for u in function.ops):
        return "gate"
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
        reader, position = _before_dispatch(op, producer, alone=rule.input.quant.block[0] == 1)
        source = reader.operands[position]
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
        reader.operands[position] = made[key]
        if activations != "bf16":
            op.attrs.setdefault("out", activations)
    fresh_names(function)
    return len(made)


def _before_dispatch(op: Op, producer: Mapping[Value, Op], alone: bool) -> tuple[Op, int]:
    """The op and operand where a product's input is quantised: before it is dispatched, so that FP8 rows travel.

    Rows without scales of their own (not `alone`) cannot leave their device.
    """
    reader, position = op, 0
    while True:
        source = reader.operands[position]
        made = producer.get(source) if isinstance(source, Value) else None
        if made is None or made.name not in DISPATCH or (made.name.startswith("comm.") and not alone):
            return reader, position
        reader, position = made, DISPATCH[made.name]


def _first_reader(function: Function, value: Value) -> Op:
    return next(op for op in function.ops if value in op.values())


def _width(operand: Operand) -> int:
    assert isinstance(operand.type, TensorType)
    return int(operand.type.shape[-1])  # type: ignore[arg-type]


def _cast_combine(module: Module, function: Function, to: Element, activations: str) -> int:
    """Quantise what experts send back, before the combine; returns how many casts were inserted."""
    found = [op for op in function.ops if op.name in COMBINE] if to.quant else []
    edit = Edit(module, function, Fp8Cast.name)
    for op in found:
        assert to.quant is not None
        attrs = {"dtype": to.dtype, "granularity": to.granularity, "scale": to.quant.scale}
        (op.operands[0],) = edit.insert(op, "quant.cast", op.operands[0], attrs=attrs)
        if activations != "bf16":
            op.attrs["out"] = activations
    fresh_names(function)
    return len(found)


def _combine_note(module: Module, to: Element, target: Target) -> str:
    """Bytes and error of one row that travels back in type `to`, beside BF16, on Gaussian rows."""
    import torch

    from moec.ir.accounting import sqnr_db
    from moec.ir.numeric import quantise as quantised

    assert to.quant is not None
    widths = {_width(op.results[0]) for _, op in module.ops() if op.name in COMBINE}
    if not widths:
        return f"combine {to} has no effect: the model has no experts"
    if to.dtype == "logfmt10" and target.kind == "cpu":
        raise PassError(name=Fp8Cast.name, message="no CPU kernel sends logfmt10: use combine=bf16 or combine=fp8")
    width = max(widths)
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    stored = quantised(rows, to.dtype, to.quant.block, to.quant.scale).dequantise()
    size = TensorType(to.dtype, (1, width), to.quant).nbytes()
    return (
        f"combine in {to}: {size} bytes a row instead of {2 * width} in bf16; on Gaussian rows "
        f"{sqnr_db(rows, stored):.1f} dB instead of {sqnr_db(rows, rows.bfloat16()):.1f}"
    )


def _set_activations(module: Module, dtype: str, stored: tuple[Element, int]) -> None:
    cache, rope = stored
    for function in module.functions.values():
        for arg in function.args:
            if isinstance(arg.type, CacheType):
                arg.type = CacheType(arg.type.kind, arg.type.shape, cache.dtype, cache.quant, rope)
            elif arg.name == "hidden" and isinstance(arg.type, TensorType):
                arg.type = arg.type.with_dtype(dtype)
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
