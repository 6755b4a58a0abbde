"""Absorbed attention on matrix tiles (`amx`): scores and weighted latents of 16 heads at a time from a BF16 cache.

Keys are the rows of a tile as they lie in the cache, and exact there. Queries and weights are split in two BF16 numbers
each, which together keep 16 bits (see `amx`). As values keys are the other operand: pairs of them, interleaved once for
all heads. Statistics and scores lie as in `flash`; outputs lie row by row, [head][latent].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import amx, flash
from moec.codegen.tvm.amx import LANES, STEP, TILE
from moec.codegen.tvm.cache import CacheLayout
from moec.codegen.tvm.cache_fp8 import BLOCK
from moec.codegen.tvm.mla_decode import Emitter
from moec.codegen.tvm.tir import Machine, const
from moec.codegen.tvm.vector import exp2, f32_to_bf16, fill, load, settle, store, transpose

KEYS = 64
"""Of a tile of keys: four tiles of rows."""
Q_HIGH, Q_LOW, KEY = 4, 5, 6
"""Tiles while scores are summed in tiles 0 to 3."""


def fits(cache: CacheLayout, machine: Machine) -> bool:
    """Whether tiles can attend over such a cache, of BF16 or FP8."""
    block, kept = (STEP, 0) if cache.dtype == "bf16" else (BLOCK, 4 * LANES)
    whole = cache.kv_rank % block == 0 and cache.rope_dim % STEP == 0 and cache.rope_dim >= kept
    return machine.tiles and cache.dtype in ("bf16", "fp8") and whole and cache.page_size % KEYS == 0


class TileEmitter(Emitter):
    """The parts of the kernel where they differ. A worker's memory for widened keys holds them interleaved instead,
    then the weights of one panel."""

    @property
    def rank(self) -> int:
        """Elements of the latent."""
        return self.spec.cache.kv_rank

    def each_panel(self, base: Any, region: Any) -> Iterator[tuple[flash.Panel, Any]]:
        """(panel, first head), 16 heads each."""
        plan, cache = self.plan, self.spec.cache
        with T.serial(0, plan.lanes // LANES) as p:
            first = T.Bind(p * LANES)
            o = settle(base + region * plan.region + first * plan.lane_elements)
            stats = settle(o + LANES * cache.kv_rank)
            q = settle(base + 2 * plan.region + first * cache.width)
            s = settle(base + 2 * plan.region + plan.lanes * cache.width)
            yield flash.Panel(self.scratch, q, o, stats, s, 1, LANES, self.machine.registers), first

    def enter(self) -> None:
        amx.configure(const(LANES))

    def leave(self) -> None:
        amx.release()

    def pack_queries(self, panel: flash.Panel, base: Any) -> None:
        """Turn the transposed queries in the memory for keys into tiles of pairs, high and low parts in turn."""
        source = self.spare(base)
        with T.serial(0, self.spec.cache.width // 2) as pair:
            values = [load(self.scratch, source + (pair * 2 + i) * LANES, LANES) for i in range(2)]
            at = T.Bind(panel.q + pair // LANES * (2 * TILE) + pair % LANES * LANES)
            for part in range(2):
                bits = [T.Cast("uint32x16", f32_to_bf16(v, LANES)) for v in values]
                high = [T.Bind(T.shift_left(b, fill(16, LANES, "uint32"))) for b in bits]
                both = T.bitwise_or(bits[0], high[1])
                store(self.scratch, T.reinterpret("float32x16", both), at + part * TILE, LANES)
                values = [T.Bind(v - T.reinterpret("float32x16", h)) for v, h in zip(values, high, strict=True)]

    def spare(self, base: Any) -> Any:
        """First element of a worker's memory for keys."""
        return T.Bind(base + (self.plan.worker - self.plan.widened))

    def queries_into(self, panel: flash.Panel, base: Any) -> flash.Panel:
        return flash.Panel(
            panel.scratch, self.spare(base), panel.o, panel.stats, panel.s, 1, LANES, self.machine.registers
        )

    def scorer(self, token: Any, begin: Any, count: Any, base: Any) -> Callable[[flash.Panel], None]:
        keys = self.position(token, begin)
        return lambda panel: self.scores(panel, keys)

    def attend(self, token: Any, tile: Any, base: Any, region: Any) -> None:
        begin = T.Bind(tile * KEYS)
        count = T.Bind(T.min(KEYS, self.seen(token) - begin))
        values = self.spare(base)
        weights = T.Bind(values + KEYS // 2 * self.rank)
        if self.chosen is not None:
            self.gathered = T.Bind(weights + 4 * TILE)
            keys = self.gather(token, begin, count)
        else:
            keys = self.position(token, begin)
        self.prepare(values)
        self.interleave(keys, count, values)
        for panel, _ in self.each_panel(base, region):
            self.scores(panel, keys)
            flash.softmax(panel, count, None)
            with T.serial(0, KEYS - count) as k:
                panel.put(fill(0.0, LANES), panel.s, count + k, 0)
            self.rescale(panel, 2)
            self.add_values(panel, values, weights)

    def gather(self, token: Any, begin: Any, count: Any) -> Any:
        """Copy the rows of chosen positions behind one another; returns where they begin in scratch memory."""
        words = self.spec.cache.width // 2
        with T.serial(0, KEYS) as k:
            source = self.position(token, begin + T.min(k, count - 1))
            target = T.Bind(self.gathered + k * words)
            with T.serial(0, words // LANES) as i:
                both = load(self.cache, source + i * STEP, STEP)
                store(self.scratch, T.reinterpret("float32x16", both), target + i * LANES, LANES)
        return self.gathered

    def prepare(self, values: Any) -> None:
        """Name further parts of the memory for keys, which begins at `values`."""

    def add_values(self, panel: flash.Panel, values: Any, weights: Any) -> None:
        """Add the keys as values, each by its weight; `weights` is memory for four tiles."""
        self.pack_weights(panel, weights)
        self.weigh(panel, values, weights, const(0), self.rank // (2 * LANES))

    def interleave(self, keys: Any, count: Any, values: Any) -> None:
        """Tiles of pairs of keys: [half of the keys][16 elements of the latent][pair][element]. Keys that are not there
        repeat the last one; their weights are zero."""
        cache = self.spec.cache
        with T.serial(0, KEYS // 2) as pair:
            lines = [T.min(pair * 2 + i, count - 1) for i in range(2)]
            stride = cache.row if self.chosen is None else cache.width // 2
            rows = [T.Bind(keys + line * stride) for line in lines]
            at = T.Bind(values + pair // LANES * (self.rank * LANES) + pair % LANES * LANES)
            with T.serial(0, self.rank // LANES) as block:
                low, high = (T.Cast("uint32x16", self.half_line(r, block)) for r in rows)
                both = T.bitwise_or(low, T.shift_left(high, fill(16, LANES, "uint32")))
                store(self.scratch, T.reinterpret("float32x16", both), at + block * TILE, LANES)

    def half_line(self, key: Any, block: Any) -> Any:
        """16 elements of a key that begins at `key`, as they are stored."""
        if self.chosen is None:
            return load(self.cache, key + block * LANES, LANES)
        return T.reinterpret("uint16x16", load(self.scratch, key + block * (LANES // 2), LANES // 2))

    def scores(self, panel: flash.Panel, keys: Any) -> None:
        """Scores of all keys of a tile, [key][head]; those of keys that are not there mean nothing."""
        cache = self.spec.cache

        def key(b: int, k: Any) -> Any:
            if self.chosen is None:
                return T.address_of(self.cache[keys + (b * LANES * cache.row + k * STEP)])
            return T.address_of(self.scratch[keys + (b * LANES * (cache.width // 2) + k * (STEP // 2))])

        stride = 2 * (cache.row if self.chosen is None else cache.width)
        self.products(panel, const(0), cache.width // STEP, key, stride, panel.s)

    def products(self, panel: flash.Panel, first: Any, steps: int, key: Any, stride: int, target: Any) -> None:
        """[key][head] at `target`: queries from step `first` on times tiles of keys at `key(block of keys, step)`."""
        blocks = range(KEYS // LANES)
        for b in blocks:
            amx.zero(b)
        with T.serial(0, steps) as k:
            at = T.Bind(panel.q + (first + k) * (2 * TILE))
            amx.load(Q_HIGH, T.address_of(self.scratch[at]))
            amx.load(Q_LOW, T.address_of(self.scratch[at + TILE]))
            for b in blocks:
                amx.load(KEY, key(b, k), stride)
                amx.dot(b, KEY, Q_HIGH)
                amx.dot(b, KEY, Q_LOW)
        for b in blocks:
            amx.store(b, T.address_of(self.scratch[target + b * TILE]))

    def pack_weights(self, panel: flash.Panel, target: Any) -> None:
        """Weights [key][head] as tiles [head][key]: of each half of the keys the high parts, then the low ones."""
        with T.serial(0, KEYS // LANES) as block:
            columns = transpose([panel.vector(panel.s, block * LANES + k, 0) for k in range(LANES)], LANES)
            at = T.Bind(target + block // 2 * (2 * TILE) + block % 2 * (LANES // 2))
            for head, values in enumerate(columns):
                self.put_parts(values, at + head * LANES)

    def put_parts(self, value: Any, at: Any) -> None:
        """Half a row of two tiles in turn: 16 numbers rounded to BF16, and what rounding took from them."""
        value = T.Bind(value)
        for part in range(2):
            bits = f32_to_bf16(value, LANES)
            store(self.scratch, T.reinterpret("float32x8", bits), at + part * TILE, LANES // 2)
            wide = T.shift_left(T.Cast("uint32x16", bits), fill(16, LANES, "uint32"))
            value = T.Bind(value - T.reinterpret("float32x16", wide))

    def rescale(self, panel: flash.Panel, line: int) -> None:
        """Multiply the outputs of every head by its element of a line of the statistics."""
        self.each_output(panel, lambda head: load(self.scratch, panel.stats + line * LANES + head, 1), None)

    def each_output(self, panel: flash.Panel, factor: Any, other: Any) -> None:
        """outputs = outputs * factor(head) + what `other(head, element)` gives."""
        with T.serial(0, LANES) as head:
            spread = T.Bind(T.broadcast(factor(head), LANES))
            row = T.Bind(panel.o + head * self.rank)
            with T.serial(0, self.rank // LANES) as i:
                value = load(self.scratch, row + i * LANES, LANES) * spread
                if other is not None:
                    value = value + other(head, i * LANES)
                store(self.scratch, value, row + i * LANES, LANES)

    def weigh(self, panel: flash.Panel, values: Any, weights: Any, first: Any, pairs: int) -> None:
        """Add the values of all keys by their weights to pairs of blocks of 16 elements, from pair `first` on."""
        for part in range(4):
            amx.load(2 + part, T.address_of(self.scratch[weights + part * TILE]))
        stride = 4 * self.rank
        with T.serial(0, pairs) as number:
            i = T.Bind(first + number)
            outputs = [T.address_of(self.scratch[panel.o + (i * 2 + j) * LANES]) for j in range(2)]
            for j in range(2):
                amx.load(j, outputs[j], stride)
            for half in range(2):
                for j in range(2):
                    amx.load(
                        6 + j, T.address_of(self.scratch[values + half * (self.rank * LANES) + (i * 2 + j) * TILE])
                    )
                for part in range(2):
                    for j in range(2):
                        amx.dot(j, 2 + 2 * half + part, 6 + j)
            for j in range(2):
                amx.store(j, outputs[j], stride)

    def finish_token(self, token: Any, base: Any, region: Any) -> None:
        spec = self.spec
        for panel, first in self.each_panel(base, region):
            flash.invert_sums(panel)
            with T.serial(0, T.min(spec.heads - first, LANES)) as head:
                factor = T.Bind(T.broadcast(load(self.scratch, panel.stats + LANES + head, 1), LANES))
                row = T.Bind(panel.o + head * self.rank)
                target = settle(T.Cast("int64", token) * spec.ld_out + (first + head) * spec.head_out)
                with T.serial(0, self.rank // LANES) as i:
                    value = load(self.scratch, row + i * LANES, LANES) * factor
                    store(self.out, value, target + i * LANES, LANES)

    def add_partial(self, panel: flash.Panel, other: flash.Panel) -> None:
        here, there = panel.vector(panel.stats, 0, 0), other.vector(other.stats, 0, 0)
        top = T.Bind(T.max(here, there))
        mine, theirs = exp2(here - top, LANES), exp2(there - top, LANES)
        total = panel.vector(panel.stats, 1, 0) * mine + other.vector(other.stats, 1, 0) * theirs
        panel.put(top, panel.stats, 0, 0)
        panel.put(total, panel.stats, 1, 0)
        # The scores are done with: their place takes the factors of each head.
        panel.put(mine, panel.s, 0, 0)
        panel.put(theirs, panel.s, 1, 0)

        def added(head: Any, element: Any) -> Any:
            factor = T.broadcast(load(self.scratch, panel.s + LANES + head, 1), LANES)
            return load(self.scratch, other.o + head * self.rank + element, LANES) * factor

        self.each_output(panel, lambda head: load(self.scratch, panel.s + head, 1), added)
