"""Absorbed attention of multi-head latent attention over the paged latent cache.

    mla_decode(q_latent, q_rope, cache, page_table, seq, pos, out, scratch, tokens)
    mla_sparse(q_latent, q_rope, cache, page_table, seq, pos, chosen, out, scratch, tokens)

q_latent[t, h, kv_rank] (the query times the key expansion of its head), q_rope[t, h, rope_dim] (rotated), out[t, h,
kv_rank] (the weighted latent, before the value expansion): fp32. seq, pos i32[tokens]; cache and page_table as in
`cache`. Token t attends to positions 0 .. pos[t] of sequence seq[t], which must be in the cache; tokens are
independent, several may belong to one sequence. 0 < tokens <= max_tokens. scratch f32[scratch_elements(spec,
machine)]. The sparse form (DeepSeek-V3.2, arXiv 2512.02556, sec. 2.1) attends to the positions chosen[t, :min(top_k,
pos[t] + 1)] instead, which are brought together tile by tile.

Key tiles of all tokens form one list that is cut into equal parts, one a core (stream-K, arXiv 2301.03598); a token cut
in two or more is put together from partial softmaxes. Source: DeepSeek-V2, arXiv 2405.04434, sec. 2.1.3 (absorption).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import flash
from moec.codegen.tvm.cache import CacheLayout, position_offset, widen_position
from moec.codegen.tvm.tir import Kernel, Machine, Param, call, const, kernel_body
from moec.codegen.tvm.vector import (
    Variable,
    exp2,
    new_kernel,
    pointers,
    row,
    scalars,
    settle,
)

_MAX_TILE = 64  # keys
_WORKER_PRODUCTS = 1 << 17  # multiply-adds that pay for waking a core (about 2 us)


@dataclass(frozen=True)
class MlaDecodeSpec:
    """`scale`: softmax scale, every factor included. `ld_*`: stride of a token, `head_*`: of a head, in elements.

    `top_k`: positions that are chosen for a token, or 0 where it attends to all.
    """

    heads: int
    cache: CacheLayout
    scale: float
    max_tokens: int
    ld_q_latent: int
    head_q_latent: int
    ld_q_rope: int
    head_q_rope: int
    ld_out: int
    head_out: int
    top_k: int = 0


@dataclass(frozen=True)
class Plan:
    """Sizes of one worker's scratch memory, in fp32 elements.

    A worker has two regions of outputs and statistics: region 0 for the token that an earlier worker began, region 1
    for the others.
    """

    spec: MlaDecodeSpec
    machine: Machine

    @property
    def tile(self) -> int:
        """Keys of a tile: within one page."""
        return math.gcd(_MAX_TILE, self.spec.cache.page_size)

    @property
    def whole_panels(self) -> int:
        """Panels of two vectors of heads."""
        return self.spec.heads // (2 * self.machine.lanes)

    @property
    def rest_vectors(self) -> int:
        """Vectors of the last panel: 0, 1 or 2."""
        return -(-(self.spec.heads % (2 * self.machine.lanes)) // self.machine.lanes)

    @property
    def lanes(self) -> int:
        """Heads rounded up to vectors."""
        return (2 * self.whole_panels + self.rest_vectors) * self.machine.lanes

    @property
    def lane_elements(self) -> int:
        """Outputs and statistics of one lane."""
        return self.spec.cache.kv_rank + 3

    @property
    def region(self) -> int:
        return self.lanes * self.lane_elements

    @property
    def scores(self) -> int:
        return (self.tile + 2 * self.machine.registers) * 2 * self.machine.lanes

    @property
    def widened(self) -> int:
        """A tile of keys in fp32, when the cache is narrower or does not hold them side by side."""
        cache = self.spec.cache
        return 0 if cache.dtype == "f32" and not self.spec.top_k else self.tile * flash.conflict_free(cache.width)

    @property
    def worker_tiles(self) -> int:
        """Fewest key tiles that are worth another core."""
        products = self.tile * self.lanes * (self.spec.cache.width + self.spec.cache.kv_rank)
        return -(-_WORKER_PRODUCTS // products)

    @property
    def worker(self) -> int:
        elements = 2 * self.region + self.lanes * self.spec.cache.width + self.scores + self.widened
        return -(-elements // 16) * 16


def scratch_elements(spec: MlaDecodeSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory."""
    return machine.cores * Plan(spec, machine).worker


class Emitter:
    """Emits the parts of the kernel around its arguments."""

    def __init__(self, spec: MlaDecodeSpec, machine: Machine, args: list[Any]) -> None:
        self.spec, self.machine, self.plan = spec, machine, Plan(spec, machine)
        self.q_latent, self.q_rope, self.cache, self.page_table, self.seq, self.pos, *chosen = args[:-3]
        self.chosen = chosen[0] if chosen else None
        self.out, self.scratch, self.tokens = args[-3:]

    def seen(self, token: Any) -> Any:
        """Positions that a token attends to."""
        count = self.pos[token] + 1
        return T.min(count, const(self.spec.top_k)) if self.spec.top_k else count

    def tiles(self, token: Any) -> Any:
        """Key tiles of a token."""
        return T.Bind((self.seen(token) + (self.plan.tile - 1)) // self.plan.tile)

    def position(self, token: Any, index: Any) -> Any:
        """Where the row of one of the positions that a token attends to begins."""
        if self.chosen is not None:
            index = T.Bind(self.chosen[row(token, self.spec.top_k) + index])
        return position_offset(self.page_table, self.seq[token], index, self.spec.cache)

    def worker_base(self, worker: Any) -> Any:
        return settle(row(worker, self.plan.worker))

    def each_panel(self, base: Any, region: Any) -> Iterator[tuple[flash.Panel, Any]]:
        """(panel, first head) of a worker's region; the consumer's code is emitted once per shape of panel."""
        plan, machine = self.plan, self.machine

        def panel(first: Any, vectors: int) -> flash.Panel:
            o = settle(base + region * plan.region + first * plan.lane_elements)
            stats = settle(o + vectors * machine.lanes * self.spec.cache.kv_rank)
            q = settle(base + 2 * plan.region + first * self.spec.cache.width)
            s = settle(base + 2 * plan.region + plan.lanes * self.spec.cache.width)
            return flash.Panel(self.scratch, q, o, stats, s, vectors, machine.lanes, machine.registers)

        rows = 2 * machine.lanes
        if plan.whole_panels:
            with T.serial(0, plan.whole_panels) as p:
                first = T.Bind(p * rows)
                yield panel(first, 2), first
        if plan.rest_vectors:
            first = const(plan.whole_panels * rows)
            yield panel(first, plan.rest_vectors), first

    def head_rows(self, panel: flash.Panel, token: Any, first: Any, ld: int, stride: int) -> list[Any]:
        """Offsets of the panel's heads of one token; past the last head they repeat it."""
        base = row(token, ld)
        last = self.spec.heads - 1
        return [settle(base + T.min(first + i, last) * stride) for i in range(panel.rows)]

    def begin_token(self, token: Any, base: Any, region: Any) -> None:
        """Pack the queries and empty the region."""
        spec, cache = self.spec, self.spec.cache
        scale = spec.scale * math.log2(math.e)
        for panel, first in self.each_panel(base, region):
            into = self.queries_into(panel, base)
            latent = self.head_rows(panel, token, first, spec.ld_q_latent, spec.head_q_latent)
            flash.pack_rows(into, self.q_latent, latent, cache.kv_rank, 0, scale)
            rope = self.head_rows(panel, token, first, spec.ld_q_rope, spec.head_q_rope)
            flash.pack_rows(into, self.q_rope, rope, cache.rope_dim, cache.kv_rank, scale)
            self.pack_queries(panel, base)
            flash.start_panel(panel, cache.kv_rank)

    def begin_scores(self, token: Any, base: Any) -> None:
        """Pack the queries of scores alone: their latent part, by the plain scale."""
        spec = self.spec
        for panel, first in self.each_panel(base, const(0)):
            rows = self.head_rows(panel, token, first, spec.ld_q_latent, spec.head_q_latent)
            flash.pack_rows(self.queries_into(panel, base), self.q_latent, rows, spec.cache.kv_rank, 0, spec.scale)
            self.pack_queries(panel, base)

    def queries_into(self, panel: flash.Panel, base: Any) -> flash.Panel:
        """Where the queries of a panel are laid out first."""
        return panel

    def pack_queries(self, panel: flash.Panel, base: Any) -> None:
        """Bring the queries into the form that the scores need: the one that they are in."""

    def key_tile(self, token: Any, begin: Any, count: Any, base: Any) -> flash.Rows:
        """The keys from position `begin` on: where they lie, or widened in the worker's scratch memory."""
        cache, plan = self.spec.cache, self.plan
        source = None if self.chosen is not None else self.position(token, begin)
        if not plan.widened:
            return flash.Rows(self.cache, source, cache.row)
        stride = flash.conflict_free(cache.width)
        target = T.Bind(base + (plan.worker - plan.widened))
        with T.serial(0, count) as k:
            at = self.position(token, begin + k) if source is None else T.Bind(source + k * cache.row)
            to = T.Bind(target + k * stride)
            widen_position(self.cache, at, cache, self.machine.lanes, self.scratch, to)
        return flash.Rows(self.scratch, target, stride)

    def scorer(self, token: Any, begin: Any, count: Any, base: Any) -> Callable[[flash.Panel], None]:
        """What scores the keys begin .. begin + count - 1, within one tile, for a panel: [key][head]."""
        keys = self.key_tile(token, begin, count, base)
        return lambda panel: flash.scores(panel, keys, count, self.spec.cache.width)

    def attend(self, token: Any, tile: Any, base: Any, region: Any) -> None:
        """One key tile for all heads."""
        cache = self.spec.cache
        begin = T.Bind(tile * self.plan.tile)
        count = T.Bind(T.min(self.plan.tile, self.seen(token) - begin))
        keys = self.key_tile(token, begin, count, base)
        for panel, _ in self.each_panel(base, region):
            flash.scores(panel, keys, count, cache.width)
            flash.softmax(panel, count, None)
            flash.weigh_values(panel, keys, count, cache.kv_rank)

    def finish_token(self, token: Any, base: Any, region: Any) -> None:
        """Write the outputs of a token whose statistics are complete."""
        spec = self.spec
        for panel, first in self.each_panel(base, region):
            flash.invert_sums(panel)
            rows = self.head_rows(panel, token, first, spec.ld_out, spec.head_out)
            flash.unpack_rows(panel, self.out, rows, spec.cache.kv_rank, 1)

    def each_token(self, body: Callable[[Any, Any, Any], None]) -> None:
        """`body(token, first tile in the list of all tiles, tiles)`."""
        if self.spec.max_tokens == 1:
            body(const(0), const(0), self.tiles(const(0)))
            return
        before = Variable(1, 0, "int32")
        with T.serial(0, self.tokens) as t:
            tiles = self.tiles(t)
            body(t, T.Bind(before.value), tiles)
            before.add(tiles)

    def work(self, worker: Any, begin: Any, end: Any) -> None:
        """The tiles begin .. end - 1 of the list."""
        base = self.worker_base(worker)

        def segment(token: Any, before: Any, tiles: Any) -> None:
            first = T.Bind(T.max(begin - before, 0))
            last = T.Bind(T.min(end - before, tiles))
            with T.If(first < last), T.Then():
                region = T.Bind(T.Select(first > 0, const(0), const(1)))
                self.begin_token(token, base, region)
                with T.serial(0, last - first) as i:
                    self.attend(token, T.Bind(first + i), base, region)
                with T.If(last - first == tiles), T.Then():
                    self.finish_token(token, base, region)

        self.enter()
        self.each_token(segment)
        self.leave()

    def enter(self) -> None:
        """What a worker does before its first tile."""

    def leave(self) -> None:
        """What it does behind its last."""

    def merge(self, token: Any, owner: Any, last: Any) -> None:
        """Complete a token in region 1 of its first worker with region 0 of the following ones, and write it."""
        base = self.worker_base(owner)
        for panel, first in self.each_panel(base, const(1)):
            with T.serial(0, last - owner) as i:
                other = self.other_panel(panel, self.worker_base(owner + 1 + i), first)
                self.add_partial(panel, other)
        self.finish_token(token, base, const(1))

    def other_panel(self, panel: flash.Panel, base: Any, first: Any) -> flash.Panel:
        """The panel of the same heads in region 0 of another worker."""
        o = settle(base + first * self.plan.lane_elements)
        stats = settle(o + panel.rows * self.spec.cache.kv_rank)
        return flash.Panel(self.scratch, panel.q, o, stats, panel.s, panel.vectors, panel.lanes, panel.registers)

    def add_partial(self, panel: flash.Panel, other: flash.Panel) -> None:
        """Fold the partial softmax of `other` into `panel`."""
        weights = []
        for v in range(panel.vectors):
            here, there = panel.vector(panel.stats, 0, v), other.vector(other.stats, 0, v)
            top = T.Bind(T.max(here, there))
            mine, theirs = exp2(here - top, panel.lanes), exp2(there - top, panel.lanes)
            total = panel.vector(panel.stats, 1, v) * mine + other.vector(other.stats, 1, v) * theirs
            panel.put(top, panel.stats, 0, v)
            panel.put(total, panel.stats, 1, v)
            weights.append((mine, theirs))
        with T.serial(0, self.spec.cache.kv_rank) as d:
            for v, (mine, theirs) in enumerate(weights):
                value = panel.vector(panel.o, d, v) * mine + other.vector(other.o, d, v) * theirs
                panel.put(value, panel.o, d, v)


def emitter_of(spec: MlaDecodeSpec, machine: Machine, args: list[Any]) -> Emitter:
    """What emits the kernel: with matrix tiles where the machine has them and the cache suits them."""
    from moec.codegen.tvm.mla_decode_tiles import TileEmitter, fits
    from moec.codegen.tvm.mla_decode_tiles_fp8 import Fp8TileEmitter

    if not fits(spec.cache, machine):
        return Emitter(spec, machine, args)
    return (Fp8TileEmitter if spec.cache.dtype == "fp8" else TileEmitter)(spec, machine, args)


def _params(spec: MlaDecodeSpec) -> list[Param]:
    return [
        *pointers("q_latent", "q_rope"),
        *pointers("cache", dtype=spec.cache.storage),
        *pointers("page_table", "seq", "pos", *(["chosen"] if spec.top_k else []), dtype="int32"),
        *pointers("out", "scratch"),
        *scalars("tokens"),
    ]


def _prefix(spec: MlaDecodeSpec) -> str:
    return "mla_sparse" if spec.top_k else "mla_decode"


def _build_part(spec: MlaDecodeSpec, machine: Machine) -> Kernel:
    """mla_decode_part(..., worker, begin, end): the tiles begin .. end - 1 of the list of all tokens' tiles."""
    part = new_kernel(f"{_prefix(spec)}_part", spec)
    with kernel_body(part, [*_params(spec), *scalars("worker", "begin", "end")]) as args:
        emitter_of(spec, machine, args[:-3]).work(*args[-3:])
    return part


def build_mla_decode(spec: MlaDecodeSpec, machine: Machine) -> Kernel:
    """mla_decode(...), or mla_sparse(...) of a spec with `top_k`."""
    kernel, part = new_kernel(_prefix(spec), spec), _build_part(spec, machine)
    kernel.helpers.append(part)
    with kernel_body(kernel, _params(spec)) as args:
        emit = emitter_of(spec, machine, args)
        total = Variable(1, 0, "int32")
        emit.each_token(lambda token, before, count: total.add(count))
        tiles = T.Bind(total.value)
        workers = T.Bind(T.max(T.min(tiles // emit.plan.worker_tiles, machine.cores), 1))
        handed_on = [*(T.address_of(a[0]) for a in args[:-1]), args[-1]]

        def begin(worker: Any) -> Any:
            return settle(T.Cast("int32", T.Cast("int64", worker) * tiles // workers), "int32")

        def owner(tile: Any) -> Any:
            return settle(T.Cast("int32", (T.Cast("int64", tile + 1) * workers - 1) // tiles), "int32")

        def merge(token: Any, before: Any, count: Any) -> None:
            first, last = owner(before), owner(before + count - 1)
            with T.If(first < last), T.Then():
                emit.merge(token, first, last)

        with T.If(workers == 1):
            with T.Then():
                call(part, *handed_on, const(0), const(0), tiles)
            with T.Else():
                with T.parallel(0, machine.cores) as w, T.If(w < workers), T.Then():
                    call(part, *handed_on, w, begin(w), begin(w + 1))
                emit.each_token(merge)
    return kernel
