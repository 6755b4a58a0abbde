"""Blocked attention with an online softmax (FlashAttention, arXiv 2205.14135) for rows that share keys and values.

A panel is a group of rows laid across vector lanes: the query tokens of one head in prefill, the heads of one token
in absorbed decoding. Queries, scores and outputs of a panel are stored transposed, [element][lane], so that keys and
values are read row by row as they lie, one broadcast element at a time, and the softmax never reduces across lanes.
Lanes beyond the last row repeat that row; they compute and store the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.tir import Machine, const
from moec.codegen.tvm.vector import Variable, exp2, fill, load, store, transpose

Accumulators = list[list[Variable]]
Elements = Callable[[Any], list[Any]]

MASKED = -1e30
"""Score of a key that a row does not see; its exponential is exactly zero."""


@dataclass(frozen=True)
class Rows:
    """Rows of fp32 elements in memory: row i starts at element `base + i * stride`."""

    buffer: Any
    base: Any
    stride: int

    def at(self, index: Any) -> Any:
        """Element offset of row `index`."""
        return self.base + index * self.stride


@dataclass(frozen=True)
class Panel:
    """Registers and memory of one panel of `vectors * lanes` rows inside the scratch buffer.

    `q`: offset of [key_dim][rows], `o`: of [value_dim][rows], `stats`: of the running maximum, the running sum and the
    last rescaling factor, [3][rows], `s`: of the scores of one key tile, [keys][rows].
    """

    scratch: Any
    q: Any
    o: Any
    stats: Any
    s: Any
    vectors: int
    lanes: int
    registers: int

    @property
    def rows(self) -> int:
        """Lanes of all vectors."""
        return self.vectors * self.lanes

    @property
    def block(self) -> int:
        """Keys or value elements whose accumulators fit the register file beside the panel's own vectors."""
        return max(1, (self.registers - self.vectors - 2) // self.vectors)

    def vector(self, base: Any, index: Any, v: int) -> Any:
        """Vector `v` of line `index` of a transposed array."""
        return load(self.scratch, base + index * self.rows + v * self.lanes, self.lanes)

    def put(self, value: Any, base: Any, index: Any, v: int) -> None:
        """Store vector `v` of line `index`."""
        store(self.scratch, value, base + index * self.rows + v * self.lanes, self.lanes)


def panel_block(vectors: int, machine: Machine) -> int:
    """`Panel.block` before there is a panel."""
    return max(1, (machine.registers - vectors - 2) // vectors)


def start_panel(panel: Panel, value_dim: int) -> None:
    """Empty statistics and outputs."""
    zero = fill(0.0, panel.lanes)
    for v in range(panel.vectors):
        panel.put(fill(MASKED, panel.lanes), panel.stats, 0, v)
        panel.put(zero, panel.stats, 1, v)
    with T.serial(0, value_dim * panel.vectors) as i:
        store(panel.scratch, zero, panel.o + i * panel.lanes, panel.lanes)


def pack_rows(panel: Panel, source: Any, offsets: Sequence[Any], dim: int, line: int, scale: float) -> None:
    """Lines `line` .. `line + dim` of the panel's queries: rows at `offsets` of `source`, transposed and scaled."""
    lanes, whole = panel.lanes, dim // panel.lanes * panel.lanes
    for v in range(panel.vectors):
        rows = offsets[v * lanes : (v + 1) * lanes]
        if whole:
            with T.serial(0, whole // lanes) as i:
                columns = transpose([load(source, r + i * lanes, lanes) for r in rows], lanes)
                for d, column in enumerate(columns):
                    panel.put(column * fill(scale, lanes), panel.q, line + i * lanes + d, v)
        if dim > whole:
            with T.serial(whole, dim) as d:
                for k, r in enumerate(rows):
                    at = panel.q + (line + d) * panel.rows + v * lanes + k
                    store(panel.scratch, load(source, r + d, 1) * const(scale, "float32"), at, 1)


def unpack_rows(panel: Panel, target: Any, offsets: Sequence[Any], dim: int, factor_line: int) -> None:
    """Write the panel's outputs times line `factor_line` of its statistics to rows at `offsets` of `target`."""
    lanes, whole = panel.lanes, dim // panel.lanes * panel.lanes
    for v in range(panel.vectors):
        rows = offsets[v * lanes : (v + 1) * lanes]
        factor = panel.vector(panel.stats, factor_line, v)
        if whole:
            with T.serial(0, whole // lanes) as i:
                lines = [T.Bind(panel.vector(panel.o, i * lanes + d, v) * factor) for d in range(lanes)]
                for r, values in zip(rows, transpose(lines, lanes), strict=True):
                    store(target, values, r + i * lanes, lanes)
        if dim > whole:
            with T.serial(whole, dim) as d:
                for k, r in enumerate(rows):
                    value = load(panel.scratch, panel.o + d * panel.rows + v * lanes + k, 1)
                    scale = load(panel.scratch, panel.stats + factor_line * panel.rows + v * lanes + k, 1)
                    store(target, value * scale, r + d, 1)


def _accumulate(panel: Panel, acc: Accumulators, extent: Any, lines: Any, elements: Elements) -> None:
    """acc[i][v] += elements(k)[i] * line k of the transposed array at `lines`, for k below `extent`."""
    with T.serial(0, extent) as k:
        vectors = [panel.vector(lines, k, v) for v in range(panel.vectors)]
        for i, element in enumerate(elements(k)):
            spread = T.Bind(T.broadcast(element, panel.lanes))
            for v, vector in enumerate(vectors):
                acc[i][v].add(spread * vector)


def _score_block(panel: Panel, keys: Rows, first: Any, starts: list[Any], dim: int) -> None:
    acc = [[Variable(panel.lanes) for _ in range(panel.vectors)] for _ in starts]
    _accumulate(panel, acc, dim, panel.q, lambda d: [keys.buffer[start + d] for start in starts])
    for i, sums in enumerate(acc):
        for v, total in enumerate(sums):
            panel.put(total.value, panel.s, first + i, v)


def scores(panel: Panel, keys: Rows, count: Any, dim: int) -> None:
    """Scores of the first `count` keys; the score array needs room for a multiple of `panel.block` keys."""
    block = panel.block
    with T.serial(0, count // block) as b:
        start = T.Bind(keys.at(b * block))
        _score_block(panel, keys, b * block, [start + i * keys.stride for i in range(block)], dim)
    with T.If(count % block > 0), T.Then():
        first = T.Bind(count // block * block)
        starts = [T.Bind(keys.at(T.min(first + i, count - 1))) for i in range(block)]
        _score_block(panel, keys, first, starts, dim)


def softmax(panel: Panel, count: Any, visible: Sequence[Any] | None, hidden: Sequence[Any] | None = None) -> None:
    """Turn the scores (base 2) of `count` keys into weights and update the statistics.

    `visible`: per vector, the number of keys of this tile that each lane sees (int32); None when all see all.
    `hidden`: of those, the number that lie before the lane's first. A lane that has seen no key yet gives all keys of
    the tile the weight 1; its first key's score then wipes them out.
    """
    lanes, vectors = panel.lanes, range(panel.vectors)
    top = [Variable(lanes, MASKED) for _ in vectors]
    total = [Variable(lanes) for _ in vectors]
    with T.serial(0, count) as k:
        for v in vectors:
            score = panel.vector(panel.s, k, v)
            if visible is not None:
                seen = T.broadcast(k, lanes) < visible[v]
                if hidden is not None:
                    seen = T.And(seen, T.broadcast(k, lanes) >= hidden[v])
                score = T.Bind(T.Select(seen, score, fill(MASKED, lanes)))
                panel.put(score, panel.s, k, v)
            top[v].set(T.max(top[v].value, score))
    maxima = []
    for v in vectors:
        before = panel.vector(panel.stats, 0, v)
        maximum = T.Bind(T.max(before, top[v].value))
        panel.put(maximum, panel.stats, 0, v)
        panel.put(exp2(before - maximum, lanes), panel.stats, 2, v)
        maxima.append(maximum)
    with T.serial(0, count) as k:
        for v in vectors:
            weight = exp2(panel.vector(panel.s, k, v) - maxima[v], lanes)
            panel.put(weight, panel.s, k, v)
            total[v].add(weight)
    for v in vectors:
        before, rescale = panel.vector(panel.stats, 1, v), panel.vector(panel.stats, 2, v)
        panel.put(before * rescale + total[v].value, panel.stats, 1, v)


def _value_block(panel: Panel, values: Rows, count: Any, first: Any, size: int) -> None:
    rescale = [panel.vector(panel.stats, 2, v) for v in range(panel.vectors)]
    acc = [[Variable(panel.lanes) for _ in range(panel.vectors)] for _ in range(size)]
    for i, sums in enumerate(acc):
        for v, total in enumerate(sums):
            total.set(panel.vector(panel.o, first + i, v) * rescale[v])

    def elements(k: Any) -> list[Any]:
        start = T.Bind(values.at(k) + first)
        return [values.buffer[start + i] for i in range(size)]

    _accumulate(panel, acc, count, panel.s, elements)
    for i, sums in enumerate(acc):
        for v, total in enumerate(sums):
            panel.put(total.value, panel.o, first + i, v)


def weigh_values(panel: Panel, values: Rows, count: Any, dim: int) -> None:
    """Rescale the outputs and add the values of `count` keys by their weights."""
    block = panel.block
    with T.serial(0, dim // block) as b:
        _value_block(panel, values, count, b * block, block)
    if dim % block:
        _value_block(panel, values, count, const(dim // block * block), dim % block)


def invert_sums(panel: Panel) -> None:
    """Replace the running sums by their reciprocals: the factors of the outputs."""
    for v in range(panel.vectors):
        total = panel.vector(panel.stats, 1, v)
        panel.put(fill(1.0, panel.lanes) / total, panel.stats, 1, v)


def conflict_free(elements: int) -> int:
    """A row stride of an odd number of 64-byte lines, so that a column of rows spreads over all cache sets."""
    lines = -(-elements // 16)
    return 16 * (lines + 1 - lines % 2)
