"""Attention with grouped heads over the paged cache of keys and values (GQA, arXiv 2305.13245).

    attn_heads(q, cache, page_table, seq, pos, [sinks], out, scratch, tokens)

q[t, h, dim] (rotated), out[t, h, v]: fp32; cache and page_table as in `cache`, a position holding the keys of all
groups, then their values; seq, pos i32[tokens]. Token t attends to positions first .. pos[t] of sequence seq[t], where
first follows from `window` and `chunk`; they must be in the cache. sinks f32[heads]: scores without a value.
0 < tokens <= max_tokens. scratch f32[scratch_elements(spec, machine)].

A panel holds rows (token, head) of one group, which share keys: heads of one token, or, for the chunk of one sequence
(`one_sequence`: consecutive positions), heads of consecutive tokens. Blocked as in FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import flash
from moec.codegen.tvm.cache import CacheLayout, position_offset
from moec.codegen.tvm.tir import Kernel, Machine, Param, const, kernel_body, parallel_kernel
from moec.codegen.tvm.vector import (
    STORAGE,
    foreach,
    load_as_f32,
    new_kernel,
    pointers,
    row,
    scalars,
    settle,
    store,
)

_MAX_TILE = 64  # keys
_SMALL = 1 << 10  # products of queries with one key, in a call, below which a second core does not pay


@dataclass(frozen=True)
class HeadsSpec:
    """`cache`: its `kv_rank` holds the keys of all groups, its `rope_dim` their values.

    `window`, `chunk`: 0 for none. `ld_*`: stride of a token, `head_*`: of a head, in elements.
    """

    heads: int
    groups: int
    cache: CacheLayout
    scale: float
    max_tokens: int
    window: int
    chunk: int
    sinks: bool
    one_sequence: bool
    ld_q: int
    head_q: int
    ld_out: int
    head_out: int

    @property
    def dim(self) -> int:
        """Width of a query and of a key."""
        return self.cache.kv_rank // self.groups

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self.cache.rope_dim // self.groups

    @property
    def share(self) -> int:
        """Heads of a group."""
        return self.heads // self.groups


@dataclass(frozen=True)
class _Plan:
    """Sizes of one worker's scratch memory, in fp32 elements."""

    spec: HeadsSpec
    machine: Machine

    @property
    def vectors(self) -> int:
        """Vectors of rows a panel."""
        most = self.spec.share * (self.spec.max_tokens if self.spec.one_sequence else 1)
        return 1 if most <= self.machine.lanes else 2

    @property
    def rows(self) -> int:
        return self.vectors * self.machine.lanes

    @property
    def tile(self) -> int:
        """Keys of a tile: within one page."""
        return math.gcd(_MAX_TILE, self.spec.cache.page_size)

    @property
    def scores(self) -> int:
        return (self.tile + 2 * self.machine.registers) * self.rows

    @property
    def widened(self) -> tuple[int, int]:
        """Row strides of a tile of keys and of values in fp32, when the cache is narrower."""
        if self.spec.cache.dtype == "f32":
            return 0, 0
        return flash.conflict_free(self.spec.dim), flash.conflict_free(self.spec.value_dim)

    @property
    def worker(self) -> int:
        panel = self.rows * (self.spec.dim + self.spec.value_dim + 3)
        return -(-(panel + self.scores + self.tile * sum(self.widened)) // 16) * 16


def scratch_elements(spec: HeadsSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory."""
    return machine.cores * _Plan(spec, machine).worker


class _Worker:
    """Emits the work of one core: panels of rows, one after the other."""

    def __init__(self, spec: HeadsSpec, machine: Machine, named: dict[str, Any], worker: Any) -> None:
        self.spec, self.machine, self.plan, self.a = spec, machine, _Plan(spec, machine), named
        plan = self.plan
        self.q = settle(row(worker, plan.worker))
        self.o = settle(self.q + plan.rows * spec.dim)
        self.stats = settle(self.o + plan.rows * spec.value_dim)
        self.s = settle(self.stats + 3 * plan.rows)
        self.keys = settle(self.s + plan.scores)
        self.values = settle(self.keys + plan.tile * plan.widened[0])

    def panel(self) -> flash.Panel:
        """The worker's panel."""
        machine = self.machine
        args = (self.plan.vectors, machine.lanes, machine.registers)
        return flash.Panel(self.a["scratch"], self.q, self.o, self.stats, self.s, *args)

    def place(self, index: Any, rows: Any, token: Any) -> tuple[Any, Any]:
        """Token and head within its group of row `index`, cut off at the last of `rows`; `token` is the first's."""
        index = T.Bind(T.min(index, rows - 1))
        return T.Bind(token + index // self.spec.share), T.Bind(index % self.spec.share)

    def task(self, token: Any, group: Any, first: Any, rows: Any) -> None:
        """Rows `first` .. of the `rows` ones that begin with `token`, for one group of heads."""
        spec, plan, panel = self.spec, self.plan, self.panel()
        places = [self.place(first + i, rows, token) for i in range(plan.rows)]
        heads = [T.Bind(group * spec.share + h) for _, h in places]
        source = [settle(row(t, spec.ld_q) + h * spec.head_q) for (t, _), h in zip(places, heads, strict=True)]
        flash.pack_rows(panel, self.a["q"], source, spec.dim, 0, spec.scale * math.log2(math.e))
        flash.start_panel(panel, spec.value_dim)
        if spec.sinks:
            self.start_sinks(panel, heads)
        # Positions grow along the panel: those of its first and last row bound what it reads.
        low, high = T.Bind(self.a["pos"][places[0][0]]), T.Bind(self.a["pos"][places[-1][0]])
        tile = plan.tile
        begin = T.Bind(self.first_seen(low, 1) // tile)
        sequence = T.Bind(self.a["seq"][places[0][0]])
        with T.serial(0, high // tile + 1 - begin) as i:
            at = T.Bind((begin + i) * tile)
            count = T.Bind(T.min(tile, high + 1 - at))
            self.attend(panel, sequence, group, at, count, low, first, rows)
        flash.invert_sums(panel)
        target = [settle(row(t, spec.ld_out) + h * spec.head_out) for (t, _), h in zip(places, heads, strict=True)]
        flash.unpack_rows(panel, self.a["out"], target, spec.value_dim, 1)

    def start_sinks(self, panel: flash.Panel, heads: list[Any]) -> None:
        """Each row's softmax begins with its sink: weight 1 at the sink's score."""
        for lane, head in enumerate(heads):
            score = self.a["sinks"][head] * const(math.log2(math.e), "float32")
            store(panel.scratch, score, panel.stats + lane, 1)
            store(panel.scratch, const(1.0, "float32"), panel.stats + panel.rows + lane, 1)

    def first_seen(self, position: Any, width: int) -> Any:
        """The first position that a token at `position` sees."""
        spec, kind = self.spec, "int32" if width == 1 else f"int32x{width}"

        def fill(value: int) -> Any:
            return const(value) if width == 1 else T.broadcast(const(value), width)

        first = fill(0)
        if spec.window:
            first = T.max(first, position - fill(spec.window - 1))
        if spec.chunk:
            first = T.max(first, T.truncdiv(position, fill(spec.chunk)) * fill(spec.chunk))
        return T.Cast(kind, first)

    def attend(
        self, panel: flash.Panel, sequence: Any, group: Any, at: Any, count: Any, low: Any, first: Any, rows: Any
    ) -> None:
        """One tile of `count` keys from position `at` on."""
        spec, lanes = self.spec, self.machine.lanes
        base = position_offset(self.a["page_table"], sequence, at, spec.cache)
        keys = self.tile_of(base + group * spec.dim, count, spec.dim, self.keys, self.plan.widened[0])
        values = self.tile_of(
            base + spec.cache.kv_rank + group * spec.value_dim, count, spec.value_dim, self.values, self.plan.widened[1]
        )
        flash.scores(panel, keys, count, spec.dim)
        visible, hidden = [], []
        for v in range(panel.vectors):
            index = T.min(T.ramp(first + v * lanes, 1, lanes), T.broadcast(rows - 1, lanes))
            token = T.truncdiv(index, T.broadcast(const(spec.share), lanes))
            # `low` is the position of the panel's first row, whose token is first // share.
            position = T.Bind(token + T.broadcast(low - first // spec.share, lanes))
            visible.append(T.Bind(position + T.broadcast(1 - at, lanes)))
            hidden.append(T.Bind(self.first_seen(position, lanes) - T.broadcast(at, lanes)))
        bounded = spec.window or spec.chunk
        flash.softmax(panel, count, visible, hidden if bounded else None)
        flash.weigh_values(panel, values, count, spec.value_dim)

    def tile_of(self, base: Any, count: Any, size: int, scratch: Any, stride: int) -> flash.Rows:
        """Keys or values of one group: where they lie, or widened in the worker's scratch memory."""
        source = settle(base)
        if not stride:
            return flash.Rows(self.a["cache"], source, self.spec.cache.width)
        with T.serial(0, count) as k:

            def widen(i: Any, width: int) -> None:
                value = load_as_f32(self.a["cache"], source + k * self.spec.cache.width + i, width)
                store(self.a["scratch"], value, scratch + k * stride + i, width)

            foreach(size, self.machine.lanes, widen)
        return flash.Rows(self.a["scratch"], scratch, stride)


def _params(spec: HeadsSpec) -> list[Param]:
    return [
        *pointers("q"),
        *pointers("cache", dtype=STORAGE[spec.cache.dtype]),
        *pointers("page_table", "seq", "pos", dtype="int32"),
        *pointers(*(["sinks"] if spec.sinks else []), "out", "scratch"),
        *scalars("tokens"),
    ]


@cache
def build_attn_heads(spec: HeadsSpec, machine: Machine) -> Kernel:
    """attn_heads(q, cache, page_table, seq, pos, [sinks,] out, scratch, tokens)."""
    part, params = new_kernel("attn_heads_part", spec), _params(spec)
    plan = _Plan(spec, machine)
    with kernel_body(part, [*params, *scalars("part", "parts")]) as args:
        named = dict(zip([p[0] for p in params], args, strict=False))
        tokens, index, parts = args[-3:]
        worker = _Worker(spec, machine, named, index)
        rows = T.Bind(tokens * spec.share) if spec.one_sequence else T.Bind(const(spec.share))
        panels = T.Bind((rows + plan.rows - 1) // plan.rows)
        tasks = T.Bind(panels * spec.groups * (1 if spec.one_sequence else tokens))
        # The last panels see the most keys: dealing them out in turn, longest first, evens the load.
        with T.serial(0, (tasks - index + parts - 1) // parts) as i:
            task = T.Bind(tasks - 1 - (i * parts + index))
            group, rest = T.Bind(task % spec.groups), T.Bind(task // spec.groups)
            panel = T.Bind(rest % panels)
            token = const(0) if spec.one_sequence else T.Bind(rest // panels)
            worker.task(token, group, T.Bind(panel * plan.rows), rows)
    name = new_kernel("attn_heads", spec).name
    work = spec.heads * (spec.dim + spec.value_dim)

    # The context is not known here: tokens of a short one are too few for a second core, those of a long one are not.
    return parallel_kernel(name, params, part, machine, lambda args: args[-1] * const(work) <= const(_SMALL))
