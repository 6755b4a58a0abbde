"""Norms of rows of heads, and layer norms. All pointers fp32; sums and the root in fp32.

    norm_heads(x, w, [b,] y, tokens)

RMS norm: y = x / rms(x) * w with rms(x) = sqrt(mean(x^2) + eps), of each head's `hidden` elements on their own; layer
norm (`centred`): y = (x - mean(x)) / rms(x - mean(x)) * w + b. w and b f32[hidden], the same for all heads. y may be x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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
class NormHeadsSpec:
    """`ldx`, `ldy`: strides of a token, `hx`, `hy`: of a head, in elements."""

    heads: int
    hidden: int
    eps: float
    centred: bool
    max_tokens: int
    ldx: int
    hx: int
    ldy: int
    hy: int


def _sum(x: Any, x0: Any, hidden: int, lanes: int, term: Any) -> Any:
    vector, scalar = Variable(lanes), Variable(1)

    def add(i: Any, width: int) -> None:
        (scalar if width == 1 else vector).add(term(load(x, x0 + i, width), width))

    foreach(hidden, lanes, add)
    return T.Bind(sum_lanes(vector.value, lanes) + scalar.value)


@cache
def build_norm_heads(spec: NormHeadsSpec, machine: Machine) -> Kernel:
    """norm_heads(x, w, [b,] y, tokens)."""
    kernel = new_kernel("norm_heads", spec)
    names = ("x", "w", *(["b"] if spec.centred else []), "y")
    with kernel_body(kernel, [*pointers(*names), *scalars("tokens")]) as args:
        x, w, y, tokens = args[0], args[1], args[-2], args[-1]
        share = const(1.0 / spec.hidden, "float32")

        def norm(t: Any) -> None:
            with T.serial(0, spec.heads) as h:
                x0, y0 = T.Bind(row(t, spec.ldx) + h * spec.hx), T.Bind(row(t, spec.ldy) + h * spec.hy)
                mean: Any = None
                if spec.centred:
                    mean = T.Bind(_sum(x, x0, spec.hidden, machine.lanes, lambda v, width: v) * share)

                def centred(v: Any, width: int) -> Any:
                    return v if mean is None else T.Bind(v - spread(mean, width))

                def square(v: Any, width: int) -> Any:
                    c = centred(v, width)
                    return c * c

                variance = _sum(x, x0, spec.hidden, machine.lanes, square) * share
                inverse = T.Bind(const(1.0, "float32") / T.sqrt(variance + const(spec.eps, "float32")))

                def scale(i: Any, width: int) -> None:
                    value = centred(load(x, x0 + i, width), width) * spread(inverse, width) * load(w, i, width)
                    store(y, value + load(args[2], i, width) if spec.centred else value, y0 + i, width)

                foreach(spec.hidden, machine.lanes, scale)

        parallel_rows(machine, tokens, spec.max_tokens, spec.heads * spec.hidden, norm)
    return allow_alias(kernel)
