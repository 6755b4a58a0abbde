"""`moec plan` with lists of batches or contexts: the form of attention at each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moec.figures import figures

if TYPE_CHECKING:
    from moec.ir import Module
    from moec.passes.planning import Options, Point
    from moec.targets import Target

_HEAD = "  batch  context       plain    absorbed   crossover"


def run_sweep(
    model: str,
    module: Module,
    targets: Sequence[tuple[Target, Options]],
    batches: Sequence[int],
    contexts: Sequence[int],
    as_json: bool,
) -> None:
    """Print the forms over batches and contexts (the workload's own where a list is empty), target by target."""
    from moec.passes.planning import sweep

    found = [
        (target, sweep(module, target, options, batches or [options.batch], contexts or [options.context]))
        for target, options in targets
    ]
    if as_json:
        answers = [{"target": target.name, "sweep": [p.as_json() for p in points]} for target, points in found]
        print(json.dumps(answers[0] if len(answers) == 1 else {"targets": answers}, allow_nan=False))
        return
    for (target, points), (_, options) in zip(found, targets, strict=True):
        print(f"{model} on {target.name}, milliseconds of a step in both forms of attention, * the cheaper")
        print(f"\ndecode, one token of each request\n{_HEAD}")
        for point in points:
            print(f"{point.batch:7} {point.context:8}  {_cells(point, 'decode')}")
        print(
            f"\nprefill: prompts of the context from empty, {options.chunk} tokens a step; of longer ones the last step"
        )
        print(_HEAD.replace("batch", "     "))
        for point in points[: len(contexts) or 1]:
            print(f"{'':7} {point.context:8}  {_cells(point, 'prefill')}")
        print()


def _cells(point: Point, phase: str) -> str:
    times, best = point.times_us[phase], point.forms[phase]
    cells = [
        f"{figures(times[form] / 1e3):>10}{'*' if form == best else ' '}" if form in times else f"{'-':>10} "
        for form in ("plain", "absorbed")
    ]
    return f"{' '.join(cells)} {_flip(point, phase):>10}"


def _flip(point: Point, phase: str) -> str:
    at = point.crossover[phase]
    return "none" if at is None else str(at)
