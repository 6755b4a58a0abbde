"""Further kernels over fp32 rows of static stride, for the variants of families.

clamp(x, y, tokens)                          y = x cut to +-limit                      y may be x
gate_rows(x, g, y, tokens)                   y[t] = sigmoid(g[t]) * x[t]               y may be x
group_bias(x, offsets, bias)                 x[r] += bias[e] for the rows offsets[e] .. of each group e
weigh_rows(x, row_token, order, weights, y, tokens)
                                             y[order[t, j]] = weights[t, j] * x[row_token[order[t, j]]]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, kernel_body
from moec.codegen.tvm.vector import (
    allow_alias,
    fill,
    foreach,
    load,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    sigmoid,
    spread,
    store,
)


@dataclass(frozen=True)
class ClampSpec:
    """`width` elements a row cut to +-`limit`."""

    width: int
    limit: float
    max_tokens: int
    ldx: int
    ldy: int


@dataclass(frozen=True)
class GateRowsSpec:
    """Rows of `width` elements; `ldg`: stride of the number that gates a row."""

    width: int
    max_tokens: int
    ldx: int
    ldg: int
    ldy: int


@dataclass(frozen=True)
class GroupBiasSpec:
    """`groups` biases of `width` elements."""

    groups: int
    width: int
    ldx: int


@dataclass(frozen=True)
class WeighRowsSpec:
    """`top_k` rows a token."""

    width: int
    top_k: int
    max_tokens: int
    ldx: int
    ldy: int


@cache
def build_clamp(spec: ClampSpec, machine: Machine) -> Kernel:
    """clamp(x, y, tokens)."""
    kernel = new_kernel("clamp", spec)
    with kernel_body(kernel, [*pointers("x", "y"), *scalars("tokens")]) as (x, y, tokens):

        def cut_row(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)

            def cut(i: Any, width: int) -> None:
                low, high = fill(-spec.limit, width), fill(spec.limit, width)
                store(y, T.max(T.min(load(x, x0 + i, width), high), low), y0 + i, width)

            foreach(spec.width, machine.lanes, cut)

        parallel_rows(machine, tokens, spec.max_tokens, spec.width, cut_row)
    return allow_alias(kernel)


@cache
def build_gate_rows(spec: GateRowsSpec, machine: Machine) -> Kernel:
    """gate_rows(x, g, y, tokens)."""
    kernel = new_kernel("gate_rows", spec)
    with kernel_body(kernel, [*pointers("x", "g", "y"), *scalars("tokens")]) as (x, g, y, tokens):

        def gate_row(t: Any) -> None:
            x0, y0 = row(t, spec.ldx), row(t, spec.ldy)
            gate = sigmoid(load(g, row(t, spec.ldg), 1), 1)

            def scale(i: Any, width: int) -> None:
                store(y, load(x, x0 + i, width) * spread(gate, width), y0 + i, width)

            foreach(spec.width, machine.lanes, scale)

        parallel_rows(machine, tokens, spec.max_tokens, spec.width, gate_row)
    return allow_alias(kernel)


@cache
def build_group_bias(spec: GroupBiasSpec, machine: Machine) -> Kernel:
    """group_bias(x, offsets, bias)."""
    kernel = new_kernel("group_bias", spec)
    params = [*pointers("x"), *pointers("offsets", dtype="int32"), *pointers("bias")]
    with kernel_body(kernel, params) as (x, offsets, bias), T.serial(0, spec.groups) as e:
        b0, first = row(e, spec.width), T.Bind(offsets[e])
        with T.serial(0, offsets[e + 1] - first) as i:
            x0 = row(first + i, spec.ldx)

            def add(c: Any, width: int) -> None:
                store(x, load(x, x0 + c, width) + load(bias, b0 + c, width), x0 + c, width)

            foreach(spec.width, machine.lanes, add)
    return kernel


@cache
def build_weigh_rows(spec: WeighRowsSpec, machine: Machine) -> Kernel:
    """weigh_rows(x, row_token, order, weights, y, tokens)."""
    kernel = new_kernel("weigh_rows", spec)
    params = [
        *pointers("x"),
        *pointers("row_token", "order", dtype="int32"),
        *pointers("weights", "y"),
        *scalars("tokens"),
    ]
    with kernel_body(kernel, params) as (x, row_token, order, weights, y, tokens):

        def weigh_token(t: Any) -> None:
            with T.serial(0, spec.top_k) as j:
                target = T.Bind(order[t * spec.top_k + j])
                weight = load(weights, t * spec.top_k + j, 1)
                x0, y0 = row(row_token[target], spec.ldx), row(target, spec.ldy)

                def scale(i: Any, width: int) -> None:
                    store(y, load(x, x0 + i, width) * spread(weight, width), y0 + i, width)

                foreach(spec.width, machine.lanes, scale)

        parallel_rows(machine, tokens, spec.max_tokens, spec.width * spec.top_k, weigh_token)
    return kernel
