"""The lightning indexer over the paged cache (DeepSeek-V3.2, arXiv 2512.02556, sec. 2.1).

    append_index(key, seq, pos, page_table, cache, tokens)
        stores key[t, :dim] at the end of the row of position pos[t] of sequence seq[t]
    index_scores(q, weights, cache, page_table, seq, pos, scores, tokens)
        scores[t, s] = sum over heads of weights[t, h] * relu(scale * q[t, h] . key of position s), s = 0 .. pos[t], for
        tokens with more than top_k positions; of the others nothing is written
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
from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body, parallel_kernel
from moec.codegen.tvm.vector import (
    Variable,
    fill,
    foreach,
    load,
    load_as_f32,
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

_RUN = 16
"""Consecutive positions that one core scores."""
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


def dot(a: Any, a0: Any, b: Any, b0: Any, size: int, lanes: int) -> Any:
    """Sum of the products of `size` elements; `b` may hold bf16."""
    sums = {width: Variable(width) for width in (lanes, 1)}

    def multiply(i: Any, width: int) -> None:
        sums[width].add(load(a, a0 + i, width) * load_as_f32(b, b0 + i, width))

    foreach(size, lanes, multiply)
    return T.Bind(sum_lanes(sums[lanes].value, lanes) + sums[1].value)


@once
def build_index_scores(spec: IndexSpec, machine: Machine) -> Kernel:
    """index_scores(q, weights, cache, page_table, seq, pos, scores, tokens)."""
    part, layout = new_kernel("index_scores_part", spec), spec.cache
    params = [
        *pointers("q", "weights"),
        *pointers("cache", dtype=layout.storage),
        *pointers("page_table", "seq", "pos", dtype="int32"),
        *pointers("scores"),
        *scalars("tokens"),
    ]
    with kernel_body(part, [*params, *scalars("part", "parts")]) as args:
        q, weights, cache, page_table, seq, pos, scores, tokens, index, parts = args

        def score(t: Any, p: Any) -> None:
            key = settle(position_offset(page_table, seq[t], p, layout) + layout.width)
            total = Variable(1)
            with T.serial(0, spec.heads) as h:
                product = dot(q, settle(row(t, spec.ld_q) + h * spec.head_q), cache, key, spec.dim, machine.lanes)
                positive = T.max(product * const(spec.scale, "float32"), const(0.0, "float32"))
                total.add(positive * load(weights, row(t, spec.ld_weights) + h, 1))
            value = T.Bind(total.value)
            # The order of bit patterns tells -0 from 0.
            zero = const(0.0, "float32")
            T.buffer_store(scores, T.Select(value == zero, zero, value), [row(t, spec.context) + p])

        with T.serial(0, tokens) as t:
            count = T.Bind(pos[t] + 1)
            with T.If(count > spec.top_k), T.Then():
                runs = T.Bind((count + (_RUN - 1)) // _RUN)
                with T.serial(0, (runs - index + parts - 1) // parts) as i:
                    first = T.Bind((i * parts + index) * _RUN)
                    with T.serial(0, T.min(const(_RUN), count - first)) as j:
                        score(t, T.Bind(first + j))
    name = new_kernel("index_scores", spec).name
    # The context is not known here: a step of some tokens beyond top_k positions has work enough.
    few = spec.top_k * spec.heads * spec.dim <= _SMALL
    return parallel_kernel(name, params, part, machine, lambda a: a[-1] <= const(1 if few else 0))


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
