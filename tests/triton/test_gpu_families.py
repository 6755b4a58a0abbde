"""Families with heads of keys and values on a GPU: every op has a kernel, and small models give the right logits.

The small models keep what is special to a family: windows, chunks of positions, sinks, biases, norms of heads, partial
and missing rotations, several layers a turn, gated shared experts, layer norms, weighed inputs of experts.
"""

from __future__ import annotations

from typing import Any

import pytest
from small_families import FAMILIES

import moec
from moec.codegen.triton.program import lower_module
from moec.model_defs.registry import preset_names

FAST = ("mixtral-8x7b", "gpt-oss-20b")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in FAMILIES])
def test_logits_of_a_family(interpreter: Any, name: str) -> None:
    """In float32, where a wrong address, mask or order shows at once; six positions cross windows and chunks."""
    found = interpreter("prompts_error", target="h800", recipe="fp32", settings=FAMILIES[name], tokens=6, model=name)
    assert found["whole"] < 1e-5 and found["steps"] < 1e-5, found
    assert not found["idle"], "kernels that no launch uses"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in preset_names()]
)
def test_every_preset_has_kernels(name: str) -> None:
    plan = moec.trace(name).optimize("h800")
    assert lower_module(plan.ir, plan.context.target, vars(plan.context.limits), tiles={}).table.entries
