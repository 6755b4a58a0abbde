"""What a device without FP8 matrix units does with FP8 weights: widen them on the way in, or hold them in BF16."""

from __future__ import annotations

from moec.ir import Module, TensorType, WeightRef
from moec.passes.base import Context
from moec.targets.cost import op_time

_PRODUCTS = ("linear", "moe.experts")


def choose(module: Module, ctx: Context) -> tuple[str, str]:
    """`weight-only` or `bf16`, whichever makes the products of a step cheaper and fits, and the reason in one line.

    The step is a decode step of the compiled batch, or a prefill chunk for a module without decode.
    """
    from moec.passes.planning.precision import RECIPES

    target, limits = ctx.target, ctx.limits
    phase = "decode" if any(f.attrs.get("phase") == "decode" for f in module.functions.values()) else "prefill"
    times = {name: _products_us(module, phase, RECIPES[name], ctx) for name in ("weight-only", "bf16")}
    capacity = target.device.memory_bytes
    sizes = {"weight-only": _elements(module), "bf16": 2 * _elements(module)}
    fitting = [n for n in times if sizes[n] <= capacity] or ["weight-only"]
    best = min(fitting, key=lambda n: times[n])
    reason = f"products of a {phase} step take {times['weight-only'] / 1e3:.2f} ms from FP8 weights, "
    reason += f"{times['bf16'] / 1e3:.2f} ms from BF16 ones"
    tokens = limits.batch if phase == "decode" else limits.chunk
    reason += f" ({tokens} tokens; {sizes['weight-only'] / 1e9:,.0f} or {sizes['bf16'] / 1e9:,.0f} GB of "
    return best, reason + f"{capacity / 1e9:.0f} on a device)"


def _products_us(module: Module, phase: str, recipe: object, ctx: Context) -> float:
    from moec.passes.planning.layout import Layout
    from moec.passes.planning.precision import Recipe
    from moec.passes.planning.rows import Rows, Step
    from moec.passes.planning.timing import functions_of

    assert isinstance(recipe, Recipe)
    limits = ctx.limits
    step = Step(phase, *((limits.batch, 1) if phase == "decode" else (1, limits.chunk)), limits.context)
    total = 0.0
    for function, calls in functions_of(module, phase):
        route = next((op for op in function.ops if op.name == "moe.route"), None)
        experts = next((op for op in function.ops if op.name == "moe.experts"), None)
        top_k = int(route.attrs["top_k"]) if route else 1  # type: ignore[arg-type]
        held = int(experts.operands[2].type.shape[0]) if experts else 0  # type: ignore[union-attr, arg-type]
        rows = Rows(step, Layout(1, 1, 1, held, held), recipe, ctx.target, 1.0, top_k, None)
        for op in function.ops:
            if op.name in _PRODUCTS:
                total += calls * sum(op_time(row, ctx.target).time_us for row in rows.of(op, "whole"))
    return total


def _elements(module: Module) -> float:
    """Elements of the matrices that one device holds: bytes in FP8."""
    names = {o.name for _, op in module.ops() if op.name in _PRODUCTS for o in op.operands if isinstance(o, WeightRef)}
    total = 0.0
    for name in names:
        weight = module.weights[name]
        assert isinstance(weight.type, TensorType)
        total += float(int(weight.type.elements())) * weight.points()  # type: ignore[arg-type]
    return total
