"""The passes that a target gets, in order."""

from __future__ import annotations

from collections.abc import Sequence

from moec.passes.base import Pass
from moec.passes.bind_limits import BindLimits
from moec.passes.canonicalise import Canonicalise
from moec.passes.fp8_cast import Fp8Cast
from moec.passes.fuse import Fuse
from moec.passes.mla_absorb import MlaAbsorb
from moec.passes.registry import parse_pass
from moec.passes.select_kernels import SelectKernels


def cpu_pipeline(recipe: str, given: Sequence[str] = ()) -> list[Pass]:
    """Passes for a CPU. `given` specs replace the pass of the same name, or are added before kernel selection.

    Decode is absorbed: the CPU has no kernel for the plain form over several sequences.
    """
    steps: list[Pass] = [
        Canonicalise(),
        BindLimits(),
        MlaAbsorb(decode="absorbed"),
        Fp8Cast(recipe=recipe),
        Fuse(),
        SelectKernels(),
        Canonicalise(),
    ]
    for spec in given:
        new = parse_pass(spec)
        same = [i for i, s in enumerate(steps) if s.name == new.name]
        if same:
            steps[same[0]] = new
        else:
            steps.insert(-2, new)
    return steps
