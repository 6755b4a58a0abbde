"""The passes that a target gets, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moec.passes.base import Pass
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.registry import PassSpecError, parse_pass, parse_spec

if TYPE_CHECKING:
    from moec.targets import Target

CPU = (
    "canonicalise",
    "bind-limits",
    "shard",
    "mla-absorb{decode=absorbed}",
    "fp8-cast",
    "fuse",
    "select-kernels",
    "canonicalise",
)
"""Decode is absorbed: the CPU has no kernel for the plain form over several sequences."""

GPU = (
    "canonicalise",
    "bind-limits",
    "shard",
    "mla-absorb",
    "fp8-cast",
    "share-heads",
    "fuse",
    "select-kernels",
    "canonicalise",
    "split-microbatches",
    "overlap",
)
"""NVIDIA and AMD devices; both phases take the form of attention that costs less."""

LAST = ("split-microbatches", "overlap")
"""Passes that go to the end, in this order."""

BEFORE = {"place-experts": "shard"}
"""Where a pass that a user adds goes, other than before kernel selection."""

PIPELINES = {"cpu": CPU, "cuda": GPU, "rocm": GPU}
"""Specs as `--pass` takes them, by the target's kind. A pass of another engine is one more line here."""


def pipeline(target: Target, recipe: str = "auto", given: Sequence[str] = (), ranks: int = 1) -> list[Pass]:
    """The passes for a target; the model is sharded when it lies on several ranks.

    `given` specs set options of the passes of the same name, which keep their others, or are added before kernel
    selection. Raises PassSpecError, for a pass or a recipe that is given twice too.
    """
    steps = [parse_pass(spec) for spec in PIPELINES[target.kind] if ranks > 1 or spec != "shard"]
    steps = [replace(step, recipe=recipe) if isinstance(step, Fp8Cast) else step for step in steps]
    asked: dict[str, str] = {}
    for spec in given:
        kind, options = parse_spec(spec)
        same = [i for i, s in enumerate(steps) if s.name == kind.name]
        if same and kind.name in asked:
            raise PassSpecError(spec=spec, message=f"the pass is given already, as {asked[kind.name]}")
        asked[kind.name] = spec
        if kind is Fp8Cast and recipe != "auto" and options.get("recipe", recipe) != recipe:
            raise PassSpecError(spec=spec, message=f"--recipe {recipe} names another recipe: leave one of them away")
        if same:
            steps[same[0]] = replace(steps[same[0]], **options)
        elif kind.name in LAST:
            steps.append(kind(**options))
            steps.sort(key=lambda s: LAST.index(s.name) if s.name in LAST else -1)
        else:
            before = BEFORE.get(kind.name, "select-kernels")
            names = [s.name for s in steps]
            steps.insert(names.index(before if before in names else "select-kernels"), kind(**options))
    return steps
