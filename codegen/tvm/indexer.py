"""The lightning indexer over the paged cache (DeepSeek-V3.2, arXiv 2512.02556, sec. 2.1).

    append_index(key, seq, pos, page_table, cache, tokens)
        stores key[t, :dim] at the end of the row of position pos[t] of sequence seq[t]
    index_scores(q, weights, cache, page_table, seq, pos, scores, scratch, tokens)
        scores[t, s] = sum over heads of weights[t, h] * relu(scale * q[t, h] . key of position s), s = 0 .. pos[t], for
        tokens with more than top_k positions; of the others nothing is written. The products are those of absorbed
        attention (see `mla_decode`) whose latent is the index key; scratch f32[scratch_elements(spec, machine)]
    index_select(scores, pos, ids, tokens)
        ids i32[t, top_k]: the positions of the best top_k scores in rising order, equal scores by rising position; -1
        behind the last where there are less

q[t, h, dim], weights[t, h], scores[t, context]: fp32; seq, pos i32[tokens]; cache and page_table as in `cache`. The
best scores are those above a threshold that bisection over the order of fp32 bit patterns finds in 32 counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.cache import CacheLayout, position_offset
from moec.codegen.tvm.mla_decode import MlaDecodeSpec, Plan, emitter_of
from moec.codegen.tvm.tir import Kernel, Machine, call, const, kernel_body
from moec.codegen.tvm.vector import (
    Variable,
    fill,
    foreach,
    load,
    new_kernel,
    parallel_rows,
    pointers,
    reduce_lanes,
    row,
    scalars,
    settle,
    spread,
    store_from_f32,
    sum_lanes,
)

_SMALL = 1 << 14
"""Products below which a second core does not pay."""


@dataclass(frozen=True)
class AppendIndexSpec:
    """Keys of `dim` elements in rows of stride `ld`."""

    cache: CacheLayout
    dim: int
    max_tokens: int
    ld: int


@dataclass(frozen=True)
class IndexSpec:
    """`context`: positions of a row of scores, a multiple of the vector width. `ld_*`, `head_q`: strides."""

    cache: CacheLayout
    heads: int
    dim: int
    top_k: int
    scale: float
    max_tokens: int
    context: int
    ld_q: int
    head_q: int
    ld_weights: int


@once
def build_append_index(spec: AppendIndexSpec, machine: Machine) -> Kernel:
    """append_index(key, seq, pos, page_table, cache, tokens)."""
    kernel, layout = new_kernel("append_index", spec), spec.cache
    params = [
        *pointers("key"),
        *pointers("seq", "pos", "page_table", dtype="int32"),
        *pointers("cache", dtype=layout.storage),
        *scalars("tokens"),
    ]
    with kernel_body(kernel, params) as (key, seq, pos, page_table, cache, tokens):

        def append(t: Any) -> None:
            target = T.Bind(position_offset(page_table, seq[t], pos[t], layout) + layout.width)
            source = row(t, spec.ld)

            def put(i: Any, width: int) -> None:
                store_from_f32(cache, load(key, source + i, width), target + i, width)

            foreach(spec.dim, machine.lanes, put)

        parallel_rows(machine, tokens, spec.max_tokens, spec.dim, append)
    return kernel


def _as_attention(spec: IndexSpec) -> MlaDecodeSpec:
    """Attention that scores index keys as its latents; the cache begins with the first key."""
    c = spec.cache
    keys = CacheLayout(spec.dim, 0, c.dtype, c.max_pages, c.page_size, c.row - spec.dim)
    q = (spec.ld_q, spec.head_q)
    return MlaDecodeSpec(spec.heads, keys, spec.scale, spec.max_tokens, *q, *q, 0, 0)


def scratch_elements(spec: IndexSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory: each core's, and the weights of its heads."""
    return machine.cores * _worker_elements(spec, machine)


def _worker_elements(spec: IndexSpec, machine: Machine) -> int:
    plan = Plan(_as_attention(spec), machine)
    return plan.worker + plan.lanes


class _Scores:
    """Emits the scores of one core: key tiles of each token in turns."""

    def __init__(self, spec: IndexSpec, machine: Machine, args: list[Any], part: Any) -> None:
        q, self.weights, cache, page_table, seq, self.pos, self.scores, self.scratch, self.tokens = args
        given = [q, q, cache, page_table, seq, self.pos, self.scores, self.scratch, self.tokens]
        self.spec, self.lanes = spec, machine.lanes
        self.emit = emitter_of(_as_attention(spec), machine, given)
        self.base = settle(row(part, _worker_elements(spec, machine)))
        self.shares = T.Bind(self.base + self.emit.plan.worker)

    def token(self, t: Any, part: Any, parts: Any) -> None:
        """The tiles part, part + parts, ... of one token."""
        tile = self.emit.plan.tile
        count = T.Bind(self.pos[t] + 1)
        with T.If(count > self.spec.top_k), T.Then():
            self.emit.begin_scores(t, self.base)
            with T.serial(0, self.emit.plan.lanes) as h:
                share = load(self.weights, row(t, self.spec.ld_weights) + T.min(h, const(self.spec.heads - 1)), 1)
                share = T.Select(h < self.spec.heads, share, const(0.0, "float32"))
                T.buffer_store(self.scratch, share, [self.shares + h])
            tiles = T.Bind((count + (tile - 1)) // tile)
            with T.serial(0, (tiles - part + parts - 1) // parts) as i:
                begin = T.Bind((i * parts + part) * tile)
                self.tile(t, begin, T.Bind(T.min(const(tile), count - begin)))

    def tile(self, t: Any, begin: Any, count: Any) -> None:
        """Scores of some positions: panel by panel, summed over heads."""
        out = settle(row(t, self.spec.context) + begin)
        zero = const(0.0, "float32")
        with T.serial(0, count) as k:
            T.buffer_store(self.scores, zero, [out + k])
        score = self.emit.scorer(t, begin, count, self.base)
        for panel, first in self.emit.each_panel(self.base, const(0)):
            score(panel)
            shares = [
                T.Bind(load(self.scratch, self.shares + first + v * self.lanes, self.lanes))
                for v in range(panel.vectors)
            ]
            with T.serial(0, count) as k:
                total = Variable(self.lanes)
                for v, share in enumerate(shares):
                    total.add(T.max(panel.vector(panel.s, k, v), fill(0.0, self.lanes)) * share)
                value = T.Bind(self.scores[out + k] + sum_lanes(total.value, self.lanes))
                # The order of bit patterns tells -0 from 0.
                T.buffer_store(self.scores, T.Select(value == zero, zero, value), [out + k])


@once
def build_index_scores(spec: IndexSpec, machine: Machine) -> Kernel:
    """index_scores(q, weights, cache, page_table, seq, pos, scores, scratch, tokens)."""
    part, layout = new_kernel("index_scores_part", spec), spec.cache
    params = [
        *pointers("q", "weights"),
        *pointers("cache", dtype=layout.storage),
        *pointers("page_table", "seq", "pos", dtype="int32"),
        *pointers("scores", "scratch"),
        *scalars("tokens"),
    ]
    with kernel_body(part, [*params, *scalars("part", "parts")]) as args:
        *given, index, parts = args
        work = _Scores(spec, machine, given, index)
        work.emit.enter()
        with T.serial(0, work.tokens) as t:
            work.token(t, index, parts)
        work.emit.leave()
    kernel = new_kernel("index_scores", spec)
    kernel.helpers.append(part)
    with kernel_body(kernel, params) as args:
        most = Variable(1, 0, "int32")
        with T.serial(0, args[-1]) as t:
            most.set(T.max(most.value, args[5][t] + 1))
        # The part's cache begins with the first position's key.
        offsets = [layout.width if i == 2 else 0 for i in range(len(args) - 1)]
        handed_on = [*(T.address_of(a[o]) for a, o in zip(args, offsets, strict=False)), args[-1]]
        few = T.Bind(args[-1] * most.value <= const(max(1, _SMALL // (spec.heads * spec.dim))))
        with T.If(most.value > spec.top_k), T.Then(), T.If(few):
            with T.Then():
                call(part, *handed_on, const(0), const(1))
            with T.Else(), T.parallel(0, machine.cores) as worker:
                call(part, *handed_on, worker, const(machine.cores))
    return kernel


def _order(value: Any, width: int) -> Any:
    """fp32 bit patterns as integers that rise with the number."""
    bits = T.Bind(T.reinterpret("int32" if width == 1 else f"int32x{width}", value))
    sign = T.shift_right(bits, fill(31, width, "int32"))
    return T.Bind(T.bitwise_xor(bits, T.bitwise_and(sign, fill(0x7FFFFFFF, width, "int32"))))


@once
def build_index_select(spec: IndexSpec, machine: Machine) -> Kernel:
    """index_select(scores, pos, ids, tokens)."""
    kernel = new_kernel("index_select", spec)
    params = [*pointers("scores"), *pointers("pos", "ids", dtype="int32"), *scalars("tokens")]
    with kernel_body(kernel, params) as (scores, pos, ids, tokens):

        def select(t: Any) -> None:
            count, out = T.Bind(pos[t] + 1), row(t, spec.top_k)
            with T.If(count <= spec.top_k):
                with T.Then(), T.serial(0, spec.top_k) as j:
                    T.buffer_store(ids, T.Select(j < count, j, const(-1)), [out + j])
                with T.Else():
                    _best(spec, machine, scores, row(t, spec.context), count, ids, out)

        parallel_rows(machine, tokens, spec.max_tokens, spec.context, select)
    return kernel


def _best(spec: IndexSpec, machine: Machine, scores: Any, s0: Any, count: Any, ids: Any, out: Any) -> None:
    """Positions of the best scores of one token that has more than top_k."""
    lanes = machine.lanes
    vectors = T.Bind((count + (lanes - 1)) // lanes)
    with T.serial(count, vectors * lanes) as p:
        T.buffer_store(scores, const(float("-inf"), "float32"), [s0 + p])

    def reaching(bound: Any) -> Any:
        """How many scores are no less than `bound`, in their order's numbers."""
        found = Variable(lanes, 0, "int32")
        with T.serial(0, vectors) as v:
            order = _order(load(scores, s0 + v * lanes, lanes), lanes)
            one, none = fill(1, lanes, "int32"), fill(0, lanes, "int32")
            found.add(T.Select(order >= spread(bound, lanes), one, none))
        return T.Bind(reduce_lanes(found.value, lanes, lambda a, b: a + b))

    low, high = Variable(1, -(1 << 31), "int64"), Variable(1, (1 << 31) - 1, "int64")
    with T.serial(0, 32):
        middle = T.Bind(low.value + T.shift_right(high.value - low.value + const(1, "int64"), const(1, "int64")))
        enough = T.Bind(reaching(T.Bind(T.Cast("int32", middle))) >= spec.top_k)
        low.set(T.Select(enough, middle, low.value))
        high.set(T.Select(enough, high.value, middle - const(1, "int64")))
    bound = T.Bind(T.Cast("int32", low.value))
    above = reaching(T.Bind(T.Cast("int32", T.min(low.value + const(1, "int64"), const((1 << 31) - 1, "int64")))))
    ties, taken = Variable(1, 0, "int32"), Variable(1, 0, "int32")
    ties.set(const(spec.top_k) - above)
    with T.serial(0, count) as p:
        order = _order(load(scores, s0 + p, 1), 1)
        tie = T.Bind(T.And(order == bound, ties.value > 0))
        fits = taken.value < spec.top_k
        with T.If(T.And(fits, T.Or(order > bound, tie))), T.Then():
            T.buffer_store(ids, p, [out + taken.value])
            taken.add(const(1))
            ties.add(T.Select(tie, const(-1), const(0)))
