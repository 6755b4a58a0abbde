"""The CPU kernel: rows of gate and up to rows of the activation, vectorised and divided over the cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.emit import FunctionEmitter, number
from moec.codegen.tvm.tir import Kernel, Machine, kernel_body
from moec.codegen.tvm.vector import (
    fill,
    foreach,
    load,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    sigmoid,
    store,
)
from moec.ir import Op


@dataclass(frozen=True)
class LimitedSpec:
    """Rows of 2 * `inner` elements to rows of `inner`; strides in elements."""

    inner: int
    limit: float
    max_tokens: int
    ldx: int
    ldy: int


def build(spec: LimitedSpec, machine: Machine) -> Kernel:
    """swiglu_limited(x, y, tokens)."""
    kernel = new_kernel("swiglu_limited", spec)
    with kernel_body(kernel, [*pointers("x", "y"), *scalars("tokens")]) as (x, y, tokens):

        def one_row(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)

            def activate(i: Any, width: int) -> None:
                high, low = fill(spec.limit, width), fill(-spec.limit, width)
                gate = T.min(load(x, x0 + i, width), high)
                up = T.max(T.min(load(x, x0 + spec.inner + i, width), high), low)
                store(y, gate * sigmoid(gate, width) * up, y0 + i, width)

            foreach(spec.inner, machine.lanes, activate)

        parallel_rows(machine, tokens, spec.max_tokens, 8 * spec.inner, one_row)
    return kernel


def emit(e: FunctionEmitter, op: Op) -> None:
    """Emit one `swiglu.limited`."""
    y = e.place(op.result)
    spec = LimitedSpec(y.shape[1], number(op, "limit"), y.shape[0], e.place(op.operands[0]).ld, y.ld)
    e.run(build, spec, e.at(op.operands[0]), e.at(op.result), e.count(op.result))
