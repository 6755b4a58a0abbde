"""Embedding lookup: embed(ids, table, y, tokens): y[t, :hidden] = table[ids[t]], ids i32[tokens].

The table is plain row-major [vocabulary, hidden] in f32 or bf16 (bit patterns as uint16), y fp32 of row stride `ldy`.
Every id must lie in the vocabulary: the runtime checks its input once, kernels do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.codegen.tvm.tir import Kernel, Machine, kernel_body
from moec.codegen.tvm.vector import (
    STORAGE,
    check_storage,
    foreach,
    load_as_f32,
    new_kernel,
    parallel_rows,
    pointers,
    row,
    scalars,
    store,
)


@dataclass(frozen=True)
class EmbedSpec:
    """`dtype`: "f32" or "bf16" elements of the table."""

    hidden: int
    dtype: str
    max_tokens: int
    ldy: int

    def __post_init__(self) -> None:
        check_storage("embed", self.dtype)


def build_embed(spec: EmbedSpec, machine: Machine) -> Kernel:
    """embed(ids, table, y, tokens)."""
    kernel = new_kernel("embed", spec)
    params = [
        *pointers("ids", dtype="int32"),
        *pointers("table", dtype=STORAGE[spec.dtype]),
        *pointers("y"),
        *scalars("tokens"),
    ]
    with kernel_body(kernel, params) as (ids, table, y, tokens):

        def copy_row(t: Any) -> None:
            source, target = row(ids[t], spec.hidden), row(t, spec.ldy)

            def widen(i: Any, width: int) -> None:
                store(y, load_as_f32(table, source + i, width), target + i, width)

            foreach(spec.hidden, machine.lanes, widen)

        parallel_rows(machine, tokens, spec.max_tokens, spec.hidden, copy_row)
    return kernel
