"""Rotary position embedding, in place: rope(x, table, positions, tokens).

x points at the rotary part of the first head of the first token: token t, head h starts at t * ld + h * head_stride and
holds `rope_dim` fp32. table f32[max_positions, rope_dim] = cos(0 .. d/2-1) | sin(0 .. d/2-1); positions i32[tokens].

Pair i is (x[2i], x[2i+1]) when `interleaved` (DeepSeek's checkpoints), (x[i], x[i + d/2]) otherwise; it turns into
(a cos - b sin, b cos + a sin) at its own place. Query and key keep one order, so their products equal those of an
implementation that also de-interleaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Kernel, Machine, kernel_body
from moec.codegen.tvm.vector import (
    KernelSpecError,
    foreach,
    load,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    shuffle,
    store,
)


@dataclass(frozen=True)
class RopeSpec:
    """`rope_dim` is even; `ld` is the stride of a token, `head_stride` of a head, in elements."""

    heads: int
    rope_dim: int
    interleaved: bool
    max_tokens: int
    ld: int
    head_stride: int

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise KernelSpecError(kernel="rope", problem=f"rotates pairs, not {self.rope_dim} elements")


def _split_pairs(x: Any, at: Any, width: int) -> tuple[Any, Any]:
    """(even, odd) elements of the 2 * width ones at `at`."""
    if width == 1:
        return load(x, at, 1), load(x, at + 1, 1)
    halves = [load(x, at, width), load(x, at + width, width)]
    return shuffle(halves, list(range(0, 2 * width, 2))), shuffle(halves, list(range(1, 2 * width, 2)))


def _join_pairs(x: Any, a: Any, b: Any, at: Any, width: int) -> None:
    """Store a and b as the even and odd elements at `at`."""
    if width == 1:
        store(x, a, at, 1)
        store(x, b, at + 1, 1)
        return
    order = [lane for i in range(width) for lane in (i, width + i)]
    store(x, shuffle([a, b], order[:width]), at, width)
    store(x, shuffle([a, b], order[width:]), at + width, width)


def build_rope(spec: RopeSpec, machine: Machine) -> Kernel:
    """rope(x, table, positions, tokens); every position must lie in the table."""
    kernel = new_kernel("rope", spec)
    half = spec.rope_dim // 2
    params = [*pointers("x", "table"), *pointers("positions", dtype="int32"), *scalars("tokens")]
    with kernel_body(kernel, params) as (x, table, positions, tokens):

        def turn_token(t: Any) -> None:
            x0, angles = row(t, spec.ld), row(positions[t], spec.rope_dim)
            with T.serial(0, spec.heads) as h:
                head = T.Bind(x0 + h * spec.head_stride)

                def turn(i: Any, width: int) -> None:
                    cos, sin = load(table, angles + i, width), load(table, angles + half + i, width)
                    if spec.interleaved:
                        a, b = _split_pairs(x, head + 2 * i, width)
                    else:
                        a, b = load(x, head + i, width), load(x, head + half + i, width)
                    turned_a, turned_b = T.Bind(a * cos - b * sin), T.Bind(b * cos + a * sin)
                    if spec.interleaved:
                        _join_pairs(x, turned_a, turned_b, head + 2 * i, width)
                    else:
                        store(x, turned_a, head + i, width)
                        store(x, turned_b, head + half + i, width)

                foreach(half, machine.lanes, turn)

        parallel_rows(machine, tokens, spec.max_tokens, spec.heads * spec.rope_dim, turn_token)
    return kernel
