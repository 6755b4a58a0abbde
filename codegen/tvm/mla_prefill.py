"""Attention of multi-head latent attention in its plain form, for a chunk of one sequence's prompt.

    mla_prefill(q, kv, k_rope, out, scratch, tokens, start)

q[t, h, nope | rope], kv[s, h, nope | v] (keys and values expanded from the latent, as kv_b_proj writes them),
k_rope[s, rope] (shared by the heads), out[t, h, v]; all fp32. Query t stands at position start + t and attends to
positions 0 .. start + t; kv and k_rope hold start + tokens positions. 0 < tokens <= max_tokens. Query and key must be
rotated already. scratch f32[scratch_elements(spec, machine)].

Source: DeepSeek-V2, arXiv 2405.04434, sec. 2.1; blocked as in FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import flash
from moec.codegen.tvm.tir import Kernel, Machine, const, kernel_body
from moec.codegen.tvm.vector import foreach, load, new_kernel, pointers, row, scalars, store

_VECTORS = 2  # vectors of query rows a panel
_MAX_PANELS = 8  # panels that share one copy of a key tile
_TASKS_PER_CORE = 4  # enough for an even load
_TILE_BLOCKS = 16  # key tile, in register blocks


@dataclass(frozen=True)
class MlaPrefillSpec:
    """`scale`: softmax scale, every factor included. `ld_*`: stride of a token, `head_*`: of a head, in elements."""

    heads: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    max_tokens: int
    ld_q: int
    head_q: int
    ld_kv: int
    head_kv: int
    ld_rope: int
    ld_out: int
    head_out: int

    @property
    def key_dim(self) -> int:
        """Elements of a whole key."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class _Plan:
    """Sizes of one worker's scratch memory, in fp32 elements."""

    spec: MlaPrefillSpec
    machine: Machine

    @property
    def rows(self) -> int:
        return _VECTORS * self.machine.lanes

    @property
    def panels(self) -> int:
        """Panels of a query tile: as many as leave enough tasks and keep a worker's memory in its L2 cache."""
        panels = _MAX_PANELS
        while panels > 1 and not self._suits(panels):
            panels //= 2
        return panels

    def _suits(self, panels: int) -> bool:
        tasks = self.spec.heads * -(-self.spec.max_tokens // (panels * self.rows))
        in_cache = 4 * (panels * self.panel + self.tiles) <= self.machine.l2_bytes * 3 // 4
        return in_cache and tasks >= _TASKS_PER_CORE * self.machine.cores

    @property
    def tile(self) -> int:
        return _TILE_BLOCKS * flash.panel_block(_VECTORS, self.machine)

    @property
    def key_stride(self) -> int:
        return flash.conflict_free(self.spec.key_dim)

    @property
    def value_stride(self) -> int:
        return flash.conflict_free(self.spec.v_dim)

    @property
    def panel(self) -> int:
        return self.rows * (self.spec.key_dim + self.spec.v_dim + 3)

    @property
    def tiles(self) -> int:
        """One tile of keys, of values and of scores."""
        return self.tile * (self.key_stride + self.value_stride + self.rows)

    @property
    def worker(self) -> int:
        return -(-(self.panels * self.panel + self.tiles) // 16) * 16


def scratch_elements(spec: MlaPrefillSpec, machine: Machine) -> int:
    """fp32 elements of scratch memory."""
    return machine.cores * _Plan(spec, machine).worker


class _Worker:
    """Emits the work of one core: query tiles of one head each."""

    def __init__(self, spec: MlaPrefillSpec, machine: Machine, args: list[Any], worker: Any) -> None:
        self.spec, self.machine, self.plan = spec, machine, _Plan(spec, machine)
        self.q, self.kv, self.k_rope, self.out, self.scratch, self.tokens, self.start = args
        plan = self.plan
        self.base = T.Bind(T.Cast("int64", worker) * const(plan.worker, "int64"))
        self.score_base = T.Bind(self.base + plan.panels * plan.panel)
        key_base = T.Bind(self.score_base + plan.tile * plan.rows)
        value_base = T.Bind(key_base + plan.tile * plan.key_stride)
        self.keys = flash.Rows(self.scratch, key_base, plan.key_stride)
        self.values = flash.Rows(self.scratch, value_base, plan.value_stride)

    def panel(self, index: Any) -> flash.Panel:
        """Panel `index` of the current query tile."""
        spec, plan = self.spec, self.plan
        q = T.Bind(self.base + index * plan.panel)
        o = T.Bind(q + plan.rows * spec.key_dim)
        stats = T.Bind(o + plan.rows * spec.v_dim)
        machine = self.machine
        return flash.Panel(self.scratch, q, o, stats, self.score_base, _VECTORS, machine.lanes, machine.registers)

    def token_rows(self, first: Any, stride: int, head_offset: Any) -> list[Any]:
        """Offsets of the panel's rows from token `first` on; past the last token they repeat it."""
        last = self.tokens - 1
        return [T.Bind(row(T.min(first + i, last), stride) + head_offset) for i in range(self.plan.rows)]

    def copy_keys(self, begin: Any, count: Any, head: Any) -> None:
        """Keys and values of positions begin .. begin + count - 1 of one head into the worker's tiles."""
        spec, lanes = self.spec, self.machine.lanes
        with T.serial(0, count) as k:
            kv0 = T.Bind(row(begin + k, spec.ld_kv) + head * spec.head_kv)
            rope0 = row(begin + k, spec.ld_rope)
            key0, value0 = T.Bind(self.keys.at(k)), T.Bind(self.values.at(k))
            for source, at, target, size in (
                (self.kv, kv0, key0, spec.nope_dim),
                (self.k_rope, rope0, key0 + spec.nope_dim, spec.rope_dim),
                (self.kv, kv0 + spec.nope_dim, value0, spec.v_dim),
            ):

                def copy(i: Any, width: int, source: Any = source, at: Any = at, target: Any = target) -> None:
                    store(self.scratch, load(source, at + i, width), target + i, width)

                foreach(size, lanes, copy)

    def visible(self, first: Any, begin: Any) -> list[Any]:
        """Per vector, how many keys from position `begin` on each lane sees."""
        lanes = self.machine.lanes
        last = T.broadcast(self.tokens - 1, lanes)
        base = T.broadcast(self.start + 1 - begin, lanes)
        return [T.Bind(base + T.min(T.ramp(first + v * lanes, 1, lanes), last)) for v in range(_VECTORS)]

    def attend(self, first: Any, panel_index: Any, begin: Any) -> None:
        """One panel over the key tile at `begin`."""
        spec = self.spec
        last_query = T.min(first + (self.plan.rows - 1), self.tokens - 1)
        count = T.Bind(T.min(self.start + last_query + 1 - begin, self.plan.tile))
        with T.If(count > 0), T.Then():
            panel = self.panel(panel_index)
            flash.scores(panel, self.keys, count, spec.key_dim)
            flash.softmax(panel, count, self.visible(first, begin))
            flash.weigh_values(panel, self.values, count, spec.v_dim)

    def query_tile(self, tile: Any, head: Any) -> None:
        """All keys for the queries of one tile."""
        spec, plan = self.spec, self.plan
        first = T.Bind(tile * (plan.panels * plan.rows))
        active = T.Bind(T.min(plan.panels, (self.tokens - first + plan.rows - 1) // plan.rows))
        with T.serial(0, active) as p:
            panel = self.panel(p)
            rows = self.token_rows(first + p * plan.rows, spec.ld_q, head * spec.head_q)
            flash.pack_rows(panel, self.q, rows, spec.key_dim, 0, spec.scale * math.log2(math.e))
            flash.start_panel(panel, spec.v_dim)
        keys = T.Bind(self.start + T.min(first + plan.panels * plan.rows, self.tokens))
        with T.serial(0, (keys + plan.tile - 1) // plan.tile) as k:
            begin = T.Bind(k * plan.tile)
            self.copy_keys(begin, T.min(plan.tile, keys - begin), head)
            with T.serial(0, active) as p:
                self.attend(T.Bind(first + p * plan.rows), p, begin)
        with T.serial(0, active) as p:
            panel = self.panel(p)
            flash.invert_sums(panel)
            rows = self.token_rows(first + p * plan.rows, spec.ld_out, head * spec.head_out)
            flash.unpack_rows(panel, self.out, rows, spec.v_dim, 1)


def build_mla_prefill(spec: MlaPrefillSpec, machine: Machine) -> Kernel:
    """mla_prefill(q, kv, k_rope, out, scratch, tokens, start)."""
    kernel = new_kernel("mla_prefill", spec)
    plan = _Plan(spec, machine)
    params = [*pointers("q", "kv", "k_rope", "out", "scratch"), *scalars("tokens", "start")]
    with kernel_body(kernel, params) as args:
        tokens = args[5]
        tiles = T.Bind((tokens + plan.panels * plan.rows - 1) // (plan.panels * plan.rows))
        # The last tiles see the most keys: dealing them out in turn, longest first, evens the load.
        with T.parallel(0, machine.cores) as w:
            worker = _Worker(spec, machine, args, w)
            with T.serial(0, (tiles * spec.heads - w + machine.cores - 1) // machine.cores) as i:
                task = T.Bind(i * machine.cores + w)
                worker.query_tile(T.Bind(tiles - 1 - task // spec.heads), T.Bind(task % spec.heads))
    return kernel
