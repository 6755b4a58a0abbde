"""Element-wise and gather kernels over fp32 rows of static stride.

add(a, b, y, tokens)              y = a + b                                 y may be a or b
scale(x, y, tokens)               y = factor * x                            y may be x
swiglu(x, y, tokens)              x[t, 2I] = (gate | up), y[t, I] = gate * sigmoid(gate) * up
gather_rows(x, rows, y, count)    y[r] = x[rows[r]], rows i32[count]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, kernel_body
from moec.codegen.tvm.vector import (
    allow_alias,
    exp,
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


@dataclass(frozen=True)
class AddSpec:
    """`width` elements a row; strides of a, b, y in elements."""

    width: int
    max_tokens: int
    lda: int
    ldb: int
    ldy: int


@dataclass(frozen=True)
class ScaleSpec:
    """`width` elements a row times the constant `factor`."""

    width: int
    factor: float
    max_tokens: int
    ldx: int
    ldy: int


@dataclass(frozen=True)
class SwigluSpec:
    """Rows of 2 * `inner` elements (gate, then up) to rows of `inner`.

    With a `limit` (0: none) gate = min(gate, limit) and up lies within +-limit; `alpha` scales the gate within the
    sigmoid, `shift` is added to up. `act`: another function of the gate than silu, as of the op `swiglu`.
    """

    inner: int
    max_tokens: int
    ldx: int
    ldy: int
    limit: float = 0.0
    alpha: float = 1.0
    shift: float = 0.0
    act: str = ""


@dataclass(frozen=True)
class GatherRowsSpec:
    """At most `max_rows` rows of `width` elements."""

    width: int
    max_rows: int
    ldx: int
    ldy: int


def build_add(spec: AddSpec, machine: Machine) -> Kernel:
    """add(a, b, y, tokens)."""
    kernel = new_kernel("add", spec)
    with kernel_body(kernel, [*pointers("a", "b", "y"), *scalars("tokens")]) as (a, b, y, tokens):

        def add_row(t: Any) -> None:
            a0, b0, y0 = row(t, spec.lda), row(t, spec.ldb), row(t, spec.ldy)

            def add(i: Any, width: int) -> None:
                store(y, load(a, a0 + i, width) + load(b, b0 + i, width), y0 + i, width)

            foreach(spec.width, machine.lanes, add)

        parallel_rows(machine, tokens, spec.max_tokens, spec.width, add_row)
    return allow_alias(kernel)


def build_scale(spec: ScaleSpec, machine: Machine) -> Kernel:
    """scale(x, y, tokens)."""
    kernel = new_kernel("scale", spec)
    with kernel_body(kernel, [*pointers("x", "y"), *scalars("tokens")]) as (x, y, tokens):

        def scale_row(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)

            def scale(i: Any, width: int) -> None:
                store(y, load(x, x0 + i, width) * fill(spec.factor, width), y0 + i, width)

            foreach(spec.width, machine.lanes, scale)

        parallel_rows(machine, tokens, spec.max_tokens, spec.width, scale_row)
    return allow_alias(kernel)


_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
"""Abramowitz and Stegun 7.1.26: erf(x) to 1.5e-7."""


def _gate(spec: SwigluSpec, x: Any, width: int) -> Any:
    """The activation of the gate."""
    zero, one = fill(0.0, width), fill(1.0, width)
    if spec.act == "relu":
        return T.Bind(T.max(x, zero))
    if spec.act == "gelu_tanh":
        # x/2 (1 + tanh u) = x sigmoid(2 u)
        cube = T.Bind(x * x * x * fill(0.044715, width))
        return x * sigmoid(T.Bind((x + cube) * fill(2 * math.sqrt(2 / math.pi), width)), width)
    if spec.act == "gelu":
        z = T.Bind(T.max(x, zero - x) * fill(math.sqrt(0.5), width))
        t = T.Bind(one / (one + z * fill(0.3275911, width)))
        power = fill(_ERF[-1], width)
        for c in reversed(_ERF[:-1]):
            power = power * t + fill(c, width)
        erf = T.Bind(one - power * t * exp(zero - z * z, width))
        return x * fill(0.5, width) * (one + T.Select(x < zero, zero - erf, erf))
    return x * sigmoid(x if spec.alpha == 1.0 else T.Bind(x * fill(spec.alpha, width)), width)


def build_swiglu(spec: SwigluSpec, machine: Machine) -> Kernel:
    """swiglu(x, y, tokens)."""
    kernel = new_kernel("swiglu", spec)
    with kernel_body(kernel, [*pointers("x", "y"), *scalars("tokens")]) as (x, y, tokens):

        def swiglu_row(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)

            def swiglu(i: Any, width: int) -> None:
                gate, up = load(x, x0 + i, width), load(x, x0 + spec.inner + i, width)
                if spec.limit:
                    top = fill(spec.limit, width)
                    gate, up = T.Bind(T.min(gate, top)), T.Bind(T.max(T.min(up, top), fill(-spec.limit, width)))
                beside = up if spec.shift == 0.0 else up + fill(spec.shift, width)
                store(y, _gate(spec, gate, width) * beside, y0 + i, width)

            foreach(spec.inner, machine.lanes, swiglu)

        # An exponential costs several plain elements.
        parallel_rows(machine, tokens, spec.max_tokens, 8 * spec.inner, swiglu_row)
    return kernel


def build_gather_rows(spec: GatherRowsSpec, machine: Machine) -> Kernel:
    """gather_rows(x, rows, y, count); every rows[r] must name a row of x."""
    kernel = new_kernel("gather_rows", spec)
    params = [*pointers("x"), *pointers("rows", dtype="int32"), *pointers("y"), *scalars("count")]
    with kernel_body(kernel, params) as (x, rows, y, count):

        def copy_row(r: Any) -> None:
            x0, y0 = row(rows[r], spec.ldx), row(r, spec.ldy)
            foreach(spec.width, machine.lanes, lambda i, width: store(y, load(x, x0 + i, width), y0 + i, width))

        parallel_rows(machine, count, spec.max_rows, spec.width, copy_row)
    return kernel
