"""Other tiles of a DeepSeek-V3 of four layers on the GPU here: measured, checked, kept where they win."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_model import BATCHES, CONTEXT, SMALL, engine_for, planned, program_for, run_once
from gpu_timing import Packed

from moec.codegen.triton import tiles
from moec.codegen.triton.errors import UnmetRequirement
from moec.codegen.triton.fused.check import symbols
from moec.codegen.triton.problem import Problem, check
from moec.codegen.triton.spec import Instance, with_tile
from moec.codegen.triton.tune import tune
from moec.ir.expr import evaluate
from moec.targets import Target

TOKENS = 100


def small_problems(target: Target, won: Mapping[str, Instance]) -> dict[str, Problem]:
    """The kernels of the same names in a small model's program, with the tiles that won: a reference takes seconds."""
    small = {e.instance.name: e.instance for e in program_for(target, SMALL)[1].table.entries.values()}
    found = {}
    for key, instance in won.items():
        if not instance.spec.source or instance.name not in small:
            continue
        try:
            same = with_tile(small[instance.name], instance.tile)
        except UnmetRequirement:
            continue
        kernel = same.spec.build.keywords["kernel"]  # type: ignore[attr-defined]
        dims = {**same.dims, "T": TOKENS, "ROWS": evaluate(kernel.rows, symbols(TOKENS)), "LOAD": 0}
        found[key] = Problem(replace(same, dims=dims), torch.Generator().manual_seed(1), "cuda")
    return found


def tuned(
    folder: Path, target: Target, until: Callable[[], bool], jobs: int, say: Callable[[str], None],
    note: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Measure other tiles; the table of measured tiles takes those that win and compute what they should."""
    plan = planned(target)
    _, engine, _kept = engine_for(folder)
    # What a real step leaves is what the launches read: at the sizes that were planned.
    for phase, tokens in (("decode", BATCHES[-1]), ("prefill", CONTEXT)):
        run_once(engine, phase, tokens)

    def keep(won: Mapping[str, tuple[Instance, tiles.Measured]]) -> None:
        problems = small_problems(target, {key: instance for key, (instance, _) in won.items()})
        packed = Packed([p.instance for p in problems.values()], jobs)
        right = {}
        for key, (instance, found) in won.items():
            worst = max(check(problems[key], packed.run).values()) if key in problems else 0.0
            note({"kernel": instance.name, "tile": [dict(found.tile.constants), found.tile.num_warps,
                  found.tile.num_stages], "us": found.microseconds, "before_us": found.declared_microseconds,
                  "checked": key in problems, "worst": min(worst, 1e30)})  # fmt: skip
            if worst <= 1:
                right[key] = found
            else:
                say(f"{instance.name}: a faster tile computes something else, not kept")
        if right:
            tiles.save(target.device.arch, right)

    source = f"measured on {engine.driver.name()}, driver {engine.driver.version}, {date.today().isoformat()}"
    limits = {"batch": BATCHES[-1], "context": CONTEXT, "chunk": CONTEXT}
    tune(engine, plan.ir, target, limits, source, 10, say, keep, until)
