"""Every kernel, every case, in Triton's interpreter against torch in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from moec.codegen.triton.spec import Case, KernelSpec, registry


def cases() -> list[Any]:
    """The first architecture's tiles in every shape class for a kernel's first case, and one of them for the others."""
    found = []
    for spec in registry().values():
        shapes = list(spec.tiles["sm_90a" if "sm_90a" in spec.tiles else next(iter(spec.tiles))])
        for i, case in enumerate(spec.cases):
            marks = [pytest.mark.slow] if case.slow else []
            for shape in shapes if i < 2 else shapes[:1]:
                found.append(pytest.param(spec, case, shape, marks=marks, id=f"{spec.name}-{shape}-{case.name}"))
    return found


@pytest.mark.parametrize(("spec", "case", "shape"), cases())
def test_kernel(interpreter: Any, spec: KernelSpec, case: Case, shape: str) -> None:
    worst = interpreter("run_case", spec=spec.name, case=case.name, arch="sm_90a", shape=shape)
    assert worst, "the reference names no result"
    assert all(share <= 1.0 for share in worst.values()), worst


@pytest.mark.parametrize("flags", itertools.product((True, False), repeat=4), ids=lambda f: "".join("ny"[x] for x in f))
def test_routers_of_other_gates(interpreter: Any, flags: tuple[bool, ...]) -> None:
    """Softmax or not, with a bias, groups scored by pairs, normalised: what a program declares when it asks for one."""
    found = interpreter("router_error", flags=list(flags))
    assert len(found) == 3
    assert all(worst and max(worst.values()) <= 1.0 for worst in found.values()), found
