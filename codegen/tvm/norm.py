"""RMS norm kernels. All pointers fp32; rows of static stride; sums and the root in fp32.

    rms_norm(x, w, y, tokens)                       y = x / rms(x) * w                   y may be x
    add_rms_norm(x, residual, w, sum_out, y, tokens)
        sum_out = x + residual, y = sum_out / rms(sum_out) * w      sum_out may be x or residual

with rms(x) = sqrt(mean(x^2) + eps) over `hidden`, w f32[hidden].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import (
    Variable,
    allow_alias,
    foreach,
    load,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    spread,
    store,
    sum_lanes,
)


@dataclass(frozen=True)
class RmsNormSpec:
    """y[t, :hidden] from x[t, :hidden]; `ldx`, `ldy`: row strides in elements."""

    hidden: int
    eps: float
    max_tokens: int
    ldx: int
    ldy: int


@dataclass(frozen=True)
class AddRmsNormSpec:
    """Strides of x, residual, sum_out and y in elements."""

    hidden: int
    eps: float
    max_tokens: int
    ldx: int
    ldr: int
    lds: int
    ldy: int


def _inverse_rms(x: Any, x0: Any, spec: RmsNormSpec | AddRmsNormSpec, machine: Machine) -> Any:
    """1 / rms of the row at offset `x0`."""
    wide = 4 * machine.lanes  # four independent sums hide the latency of the fused multiply-add
    vector, scalar = Variable(wide), Variable(1)

    def square(i: Any, width: int) -> None:
        v = load(x, x0 + i, width)
        (scalar if width == 1 else vector).add(v * v)

    foreach(spec.hidden, wide, square)
    mean = (sum_lanes(vector.value, wide) + scalar.value) * const(1.0 / spec.hidden, "float32")
    return T.Bind(const(1.0, "float32") / T.sqrt(mean + const(spec.eps, "float32")))


def _scale_row(x: Any, x0: Any, w: Any, y: Any, y0: Any, inverse: Any, hidden: int, lanes: int) -> None:
    def scale(i: Any, width: int) -> None:
        store(y, load(x, x0 + i, width) * spread(inverse, width) * load(w, i, width), y0 + i, width)

    foreach(hidden, lanes, scale)


def build_rms_norm(spec: RmsNormSpec, machine: Machine) -> Kernel:
    """rms_norm(x, w, y, tokens)."""
    kernel = new_kernel("rms_norm", spec)
    with kernel_body(kernel, [*pointers("x", "w", "y"), *scalars("tokens")]) as (x, w, y, tokens):

        def norm(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)
            _scale_row(x, x0, w, y, y0, _inverse_rms(x, x0, spec, machine), spec.hidden, machine.lanes)

        parallel_rows(machine, tokens, spec.max_tokens, spec.hidden, norm)
    return allow_alias(kernel)


def build_add_rms_norm(spec: AddRmsNormSpec, machine: Machine) -> Kernel:
    """add_rms_norm(x, residual, w, sum_out, y, tokens)."""
    kernel = new_kernel("add_rms_norm", spec)
    with kernel_body(kernel, [*pointers("x", "residual", "w", "sum_out", "y"), *scalars("tokens")]) as (
        x,
        residual,
        w,
        sum_out,
        y,
        tokens,
    ):

        def norm(t: Any) -> None:
            x0, r0, s0, y0 = row(t, spec.ldx), row(t, spec.ldr), row(t, spec.lds), row(t, spec.ldy)

            def add(i: Any, width: int) -> None:
                store(sum_out, load(x, x0 + i, width) + load(residual, r0 + i, width), s0 + i, width)

            foreach(spec.hidden, machine.lanes, add)
            inverse = _inverse_rms(sum_out, s0, spec, machine)
            _scale_row(sum_out, s0, w, y, y0, inverse, spec.hidden, machine.lanes)

        parallel_rows(machine, tokens, spec.max_tokens, 2 * spec.hidden, norm)
    return allow_alias(kernel)
