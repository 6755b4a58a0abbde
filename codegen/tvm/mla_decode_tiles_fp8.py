"""Absorbed attention on matrix tiles from an FP8 cache: elements are exact in BF16, scales go to scores and weights.

A tile of keys is decoded once for all heads, as rows for the scores and interleaved for the values. The scores of each
block of 128 elements are summed apart and multiplied by the keys' scales of that block; as values the block's elements
are weighed by weight times scale. The rotary key is BF16 and stays where it lies.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import flash
from moec.codegen.tvm.amx import LANES, STEP, TILE
from moec.codegen.tvm.cache_fp8 import BLOCK, decode_e4m3, load_scale
from moec.codegen.tvm.mla_decode_tiles import KEYS, TileEmitter
from moec.codegen.tvm.tir import const
from moec.codegen.tvm.vector import fill, load, store, transpose


class Fp8TileEmitter(TileEmitter):
    """Behind the interleaved keys lie the tiles of weights, the keys' rows, scores of one block, weights by head
    and the scales [block][key]."""

    @property
    def blocks(self) -> int:
        """Blocks of the latent that have a scale each."""
        return self.rank // BLOCK

    @property
    def row(self) -> int:
        """FP32 elements from one decoded key to the next: an odd number of lines spreads them over the cache's sets."""
        return self.rank // 2 + LANES

    def prepare(self, values: Any) -> None:
        self.rows = T.Bind(values + (KEYS // 2 * self.rank + 4 * TILE))
        self.part = T.Bind(self.rows + KEYS * self.row)
        self.by_head = T.Bind(self.part + KEYS * LANES)
        self.scales = T.Bind(self.by_head + KEYS * LANES)

    def interleave(self, keys: Any, count: Any, values: Any) -> None:
        with T.serial(0, KEYS // 2) as pair:
            rows = [T.Bind(keys + T.min(pair * 2 + i, count - 1) * self.spec.cache.row) for i in range(2)]
            decoded = [T.Bind(self.rows + (pair * 2 + i) * self.row) for i in range(2)]
            at = T.Bind(values + pair // LANES * (self.rank * LANES) + pair % LANES * LANES)
            for i, row in enumerate(rows):
                for b in range(self.blocks):
                    scale = load_scale(self.cache, row + (self.rank + 4 * b))
                    store(self.scratch, scale, self.scales + (b * KEYS + i) + pair * 2, 1)
            with T.serial(0, self.rank // LANES) as block:
                bits = []
                for row, target in zip(rows, decoded, strict=True):
                    value = decode_e4m3(load(self.cache, row + block * LANES, LANES), LANES) * fill(2.0**120, LANES)
                    wide = T.Bind(T.reinterpret("uint32x16", value))
                    bits.append(wide)
                    half = T.Cast("uint16x16", T.shift_right(wide, fill(16, LANES, "uint32")))
                    store(self.scratch, T.reinterpret("float32x8", half), target + block * (LANES // 2), LANES // 2)
                both = T.bitwise_or(T.shift_right(bits[0], fill(16, LANES, "uint32")), bits[1])
                store(self.scratch, T.reinterpret("float32x16", both), at + block * TILE, LANES)

    def scores(self, panel: flash.Panel, keys: Any) -> None:
        cache, steps = self.spec.cache, BLOCK // STEP
        tail = self.rank + 4 * self.blocks

        def rope(b: int, k: Any) -> Any:
            return T.address_of(self.cache[keys + (b * LANES * cache.row + tail + k * (2 * STEP))])

        self.products(panel, const(self.rank // STEP), cache.rope_dim // STEP, rope, cache.row, panel.s)
        with T.serial(0, self.blocks) as block:
            first = T.Bind(block * steps)

            def latent(b: int, k: Any, first: Any = first) -> Any:
                return T.address_of(self.scratch[self.rows + (b * LANES * self.row) + (first + k) * (STEP // 2)])

            self.products(panel, first, steps, latent, 4 * self.row, self.part)
            with T.serial(0, KEYS) as key:
                scale = T.broadcast(load(self.scratch, self.scales + block * KEYS + key, 1), LANES)
                part = load(self.scratch, self.part + key * LANES, LANES)
                panel.put(panel.vector(panel.s, key, 0) + part * scale, panel.s, key, 0)

    def add_values(self, panel: flash.Panel, values: Any, weights: Any) -> None:
        with T.serial(0, KEYS // LANES) as group:
            lines = [panel.vector(panel.s, group * LANES + k, 0) for k in range(LANES)]
            for head, column in enumerate(transpose(lines, LANES)):
                store(self.scratch, column, self.by_head + head * KEYS + group * LANES, LANES)
        pairs = BLOCK // (2 * LANES)
        with T.serial(0, self.blocks) as block:
            with T.serial(0, KEYS // LANES) as group:
                scale = load(self.scratch, self.scales + block * KEYS + group * LANES, LANES)
                at = T.Bind(weights + group // 2 * (2 * TILE) + group % 2 * (LANES // 2))
                with T.serial(0, LANES) as head:
                    value = load(self.scratch, self.by_head + head * KEYS + group * LANES, LANES)
                    self.put_parts(value * scale, at + head * LANES)
            self.weigh(panel, values, weights, block * pairs, pairs)
