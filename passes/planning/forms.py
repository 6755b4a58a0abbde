"""The form of latent attention that costs less in a phase, and the context where the answer changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moec.ir import Module
from moec.ir.rewrite import clone_module, fresh_names, remove_dead
from moec.passes.base import Context
from moec.passes.fuse import Fuse
from moec.passes.mla_absorb import absorb
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import Setting, StepCost, step_cost

PLAIN, ABSORBED = "plain", "absorbed"
Variants = dict[str, Module]


def variants(module: Module, setting: Setting) -> Variants:
    """The module with plain and with absorbed attention, fused as the device runs it; plain alone without latents.

    Projections are joined on whole devices only: tensor parallelism divides some of them and not others.
    """
    forms = {PLAIN: clone_module(module)}
    if any(op.name == "attn.mla" for _, op in module.ops()):
        forms[ABSORBED] = absorbed = clone_module(module)
        for function in absorbed.functions.values():
            for op in [o for o in function.ops if o.name == "attn.mla"]:
                absorb(absorbed, function, op)
            remove_dead(function)
            fresh_names(function)
    if setting.layout.tp == 1:
        for each in forms.values():
            Fuse().run(each, Context(setting.target))
    return forms


@dataclass(frozen=True)
class Choice:
    """The cheaper form of a phase, the cost of the step in each in microseconds, and where the choice flips.

    crossover: the smallest context, at the same sequences and new tokens, from which the other form than at short
    context is cheaper; None when one form wins at every context up to the model's limit, or is the only one.
    """

    form: str
    times_us: dict[str, float]
    cost: StepCost
    crossover: int | None


def choose(built: Variants, step: Step, limit: int, setting: Setting) -> Choice:
    """Compare the forms at `step`, and solve for the crossover up to a context of `limit`."""
    costs = {form: step_cost(module, step, setting) for form, module in built.items()}
    times = {form: cost.serial_us for form, cost in costs.items()}
    form = cheaper(times)
    return Choice(form, times, costs[form], crossover(built, step, limit, setting))


def form_times(built: Variants, step: Step, setting: Setting) -> dict[str, float]:
    """Microseconds of a step, its ops one after the other, in each form."""
    return {form: step_cost(module, step, setting).serial_us for form, module in built.items()}


def cheaper(times_us: dict[str, float]) -> str:
    """The form that takes less time."""
    return min(times_us, key=lambda form: times_us[form])


def crossover(built: Variants, step: Step, limit: int, setting: Setting) -> int | None:
    """The first context at which the cheaper form is no longer the one of a short context; None with one form.

    Powers of two bracket the change, bisection finds it: costs grow in steps of tiles, so it is exact between the
    contexts of its bracket only where the difference changes sign once.
    """

    def absorbed_wins(context: int) -> bool:
        times = form_times(built, replace(step, context=context), setting)
        return times[ABSORBED] < times[PLAIN]

    return first_change(absorbed_wins, step.new, limit) if len(built) > 1 else None


def first_change(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number, in the first doubling bracket of `low..high` that has one, where `holds` has changed."""
    start = holds(low)
    upper = low
    while upper < high:
        lower, upper = upper, min(2 * upper, high)
        if holds(upper) != start:
            while upper - lower > 1:
                middle = (lower + upper) // 2
                lower, upper = (middle, upper) if holds(middle) == start else (lower, middle)
            return upper
    return None
