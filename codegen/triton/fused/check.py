"""Random problems of generated kernels, and what they must give: the IR's own evaluation of the ops, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.codegen.triton.fused.binding import Generated
    from moec.codegen.triton.problem import Expected, Problem


def build_generated(kernel: Generated, p: Problem) -> dict[str, Any]:
    raise NotImplementedError


def reference_generated(kernel: Generated, p: Problem, x: dict[str, Any]) -> dict[str, Expected]:
    raise NotImplementedError
