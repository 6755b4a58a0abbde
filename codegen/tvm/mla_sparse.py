"""Absorbed latent attention over chosen positions of the paged cache (DeepSeek-V3.2, arXiv 2512.02556, sec. 2.1).

    mla_sparse(q_latent, q_rope, cache, page_table, seq, pos, chosen, out, scratch, tokens)

As `mla_decode`, over the positions chosen[t, :min(top_k, pos[t] + 1)] of sequence seq[t]. A task is one head of one
token; scratch f32[scratch_elements(spec, machine)] holds its scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache as once
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.cache import CacheLayout, position_offset
from moec.codegen.tvm.indexer import dot
from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body, parallel_kernel
from moec.codegen.tvm.vector import (
    Variable,
    exp2,
    load_as_f32,
    new_kernel,
    pointers,
    row,
    scalars,
    settle,
    spread,
    store,
)

_SUMS = 8
"""Vectors of the output that are summed in one pass over the chosen positions."""


@dataclass(frozen=True)
class MlaSparseSpec:
    """`ld_*`: stride of a token, `head_*`: of a head, in elements."""

    heads: int
    cache: CacheLayout
    scale: float
    top_k: int
    max_tokens: int
    ld_q_latent: int
    head_q_latent: int
    ld_q_rope: int
    head_q_rope: int
    ld_out: int
    head_out: int


def _worker_elements(spec: MlaSparseSpec) -> int:
    return -(-spec.top_k // 16) * 16


def scratch_elements(spec: MlaSparseSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory."""
    return machine.cores * _worker_elements(spec)


class _Head:
    """Emits the attention of one head of one token."""

    def __init__(self, spec: MlaSparseSpec, machine: Machine, args: list[Any], task: Any, worker: Any) -> None:
        self.spec, self.lanes = spec, machine.lanes
        self.q_latent, self.q_rope, self.cache, self.page_table, self.seq, self.pos = args[:6]
        self.chosen, self.out, self.scratch = args[6:9]
        self.token, self.head = T.Bind(task // spec.heads), T.Bind(task % spec.heads)
        self.count = T.Bind(T.min(const(spec.top_k), self.pos[self.token] + 1))
        self.scores = settle(row(worker, _worker_elements(spec)))

    def at(self, j: Any) -> Any:
        """Where the row of the j-th chosen position begins."""
        position = T.Bind(self.chosen[row(self.token, self.spec.top_k) + j])
        return settle(position_offset(self.page_table, self.seq[self.token], position, self.spec.cache))

    def emit(self) -> None:
        spec, lanes = self.spec, self.lanes
        latent = settle(row(self.token, spec.ld_q_latent) + self.head * spec.head_q_latent)
        rope = settle(row(self.token, spec.ld_q_rope) + self.head * spec.head_q_rope)
        rank, top, total = spec.cache.kv_rank, Variable(1, -3.0e38), Variable(1)
        with T.serial(0, self.count) as j:
            source = self.at(j)
            score = dot(self.q_latent, latent, self.cache, source, rank, lanes)
            score = score + dot(self.q_rope, rope, self.cache, source + rank, spec.cache.rope_dim, lanes)
            score = T.Bind(score * const(spec.scale * math.log2(math.e), "float32"))
            T.buffer_store(self.scratch, score, [self.scores + j])
            top.set(T.max(top.value, score))
        largest = T.Bind(top.value)
        with T.serial(0, self.count) as j:
            weight = exp2(self.scratch[self.scores + j] - largest, 1)
            T.buffer_store(self.scratch, weight, [self.scores + j])
            total.add(weight)
        inverse = T.Bind(const(1.0, "float32") / total.value)
        whole = rank // lanes * lanes
        for first in range(0, whole, _SUMS * lanes):
            self.sums(first, min(_SUMS, (whole - first) // lanes), lanes, inverse)
        for first in range(whole, rank, _SUMS):
            self.sums(first, min(_SUMS, rank - first), 1, inverse)

    def sums(self, first: int, vectors: int, width: int, inverse: Any) -> None:
        """The elements from `first` on, `vectors` of `width`."""
        out = settle(row(self.token, self.spec.ld_out) + self.head * self.spec.head_out)
        sums = [Variable(width) for _ in range(vectors)]
        with T.serial(0, self.count) as j:
            source, weight = self.at(j), spread(T.Bind(self.scratch[self.scores + j]), width)
            for v, one in enumerate(sums):
                one.add(weight * load_as_f32(self.cache, source + (first + v * width), width))
        for v, one in enumerate(sums):
            store(self.out, one.value * spread(inverse, width), out + (first + v * width), width)


@once
def build_mla_sparse(spec: MlaSparseSpec, machine: Machine) -> Kernel:
    """mla_sparse(q_latent, q_rope, cache, page_table, seq, pos, chosen, out, scratch, tokens)."""
    part = new_kernel("mla_sparse_part", spec)
    params = [
        *pointers("q_latent", "q_rope"),
        *pointers("cache", dtype=spec.cache.storage),
        *pointers("page_table", "seq", "pos", "chosen", dtype="int32"),
        *pointers("out", "scratch"),
        *scalars("tokens"),
    ]
    with kernel_body(part, [*params, *scalars("part", "parts")]) as args:
        tokens, index, parts = args[-3:]
        tasks = T.Bind(tokens * spec.heads)
        with T.serial(0, (tasks - index + parts - 1) // parts) as i:
            _Head(spec, machine, args, T.Bind(i * parts + index), index).emit()
    name = new_kernel("mla_sparse", spec).name
    return parallel_kernel(name, params, part, machine, lambda a: a[-1] * const(spec.heads) < const(2))
