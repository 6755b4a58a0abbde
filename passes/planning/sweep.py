"""The form of latent attention over batches and contexts: where absorption pays on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from moec.ir import Module
from moec.passes.planning.forms import Variants, cheaper, crossover, form_times, variants
from moec.passes.planning.layout import resolve
from moec.passes.planning.plan import PHASES, Options, check, model_limit, step_of
from moec.passes.planning.precision import candidates
from moec.passes.planning.rows import Step
from moec.passes.planning.timing import Setting
from moec.targets import Target


@dataclass(frozen=True)
class Point:
    """One batch and context: recipe, and by phase the microseconds of a step in both forms, and the crossover.

    A prompt has the point's context with nothing cached; its step is the last chunk of it.
    """

    batch: int
    context: int
    recipe: str
    times_us: dict[str, dict[str, float]]
    crossover: dict[str, int | None]

    @property
    def forms(self) -> dict[str, str]:
        """The cheaper form of each phase."""
        return {phase: cheaper(times) for phase, times in self.times_us.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the field names of a plan."""
        return {
            "batch": self.batch,
            "context": self.context,
            "recipe": self.recipe,
            "forms": self.forms,
            "form_times_us": self.times_us,
            "crossover_context": self.crossover,
        }


def sweep(
    module: Module, target: Target, options: Options, batches: Sequence[int], contexts: Sequence[int]
) -> list[Point]:
    """Every batch with every context, in that order; the recipe of each point is the one whose decode step is fastest.

    Raises what `make_plan` raises.
    """
    limit = model_limit(module)
    asked = [replace(options, batch=b, context=c, prompt=c) for b in batches for c in contexts]
    for one in asked:
        check(one, limit)
    found = [_with_recipe(module, target, options, name, asked, limit) for name in _recipes(options, target)]
    return [min(points, key=lambda p: min(p.times_us["decode"].values())) for points in zip(*found, strict=True)]


def _recipes(options: Options, target: Target) -> list[str]:
    return [r.name for r in candidates(options.recipe, target)]


def _with_recipe(
    module: Module, target: Target, options: Options, name: str, asked: Sequence[Options], limit: int
) -> list[Point]:
    (recipe,) = candidates(name, target)
    layout, sized = resolve(module, target, recipe, options.layout)
    setting = Setting(layout, recipe, sized, options.balance)
    built: Variants = variants(module, setting)

    @cache
    def times_of(step: Step) -> dict[str, float]:
        return form_times(built, step, setting)

    @cache
    def flips(phase: str, sequences: int, new: int) -> int | None:
        return crossover(built, Step(phase, sequences, new, new), limit, setting)

    points = []
    for one in asked:
        steps = {phase: step_of(phase, one) for phase in PHASES}
        times = {phase: times_of(step) for phase, step in steps.items()}
        at = {phase: flips(phase, step.sequences, step.new) for phase, step in steps.items()}
        points.append(Point(one.batch, one.context, name, times, at))
    return points
