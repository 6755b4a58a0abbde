"""Linear layer over packed weights: y[t, :n] = x[t, :k] . W^T (+ bias) (+ y).

    kernel(x, w, [scale], [bias], y, scratch, tokens)

x f32[tokens, ldx] and y f32[tokens, ldy] may be slices of wider rows (pass the address of the first element); w is
one packed matrix (`formats.pack`), scale its scales (scaled formats only), bias f32[n] if `spec.bias`; scratch f32 of
`scratch_size(spec, machine)` elements, free to share between kernels; 0 < tokens <= spec.max_tokens. y must not
overlap x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.formats import Format
from moec.codegen.tvm.matrix import Problem, Rows, build_problem, scratch_floats
from moec.codegen.tvm.tir import Kernel, Machine, const


@dataclass(frozen=True)
class LinearSpec:
    """Static parameters of a linear kernel; row strides in elements."""

    n: int
    k: int
    fmt: Format
    ldx: int
    ldy: int
    max_tokens: int
    bias: bool = False
    accumulate: bool = False

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        options = ("_bias" if self.bias else "") + ("_acc" if self.accumulate else "")
        return f"linear_{self.fmt.name}_{self.n}x{self.k}_ldx{self.ldx}_ldy{self.ldy}_t{self.max_tokens}{options}"


def scratch_size(spec: LinearSpec, machine: Machine) -> int:
    """Elements (f32) of the scratch operand."""
    return scratch_floats(spec.k, spec.fmt, spec.max_tokens, machine)


@cache
def build(spec: LinearSpec, machine: Machine) -> Kernel:
    """The kernel of `spec` for `machine`."""

    def rows(args: dict[str, Any]) -> Rows:
        return Rows(
            count=lambda g: args["tokens"],
            x_at=lambda g, i: T.Cast("int64", i) * const(spec.ldx, "int64"),
            y_at=lambda g, i: T.Cast("int64", i) * const(spec.ldy, "int64"),
        )

    problem = Problem(
        spec.name, 1, spec.n, spec.k, spec.fmt, spec.max_tokens, (), ("tokens",), rows,
        total_rows=lambda args: args["tokens"], bias=spec.bias, accumulate=spec.accumulate,
    )  # fmt: skip
    return build_problem(problem, machine)
