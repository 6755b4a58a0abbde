"""Products by matrix tiles (`amx`): a weight tile with few rows of x at the speed of memory, a panel with many.

Sums of one scale block are made in tiles, then scaled and added up in FP32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import amx
from moec.codegen.tvm.amx import LANES, STEP, TILE
from moec.codegen.tvm.decode import block_scale
from moec.codegen.tvm.gemv import ahead, prefetch
from moec.codegen.tvm.tir import Kernel, Machine, Param, const, kernel_body, splat
from moec.ir.lane16 import ROWS, Format

NARROW = 8
"""Most rows of x whose two parts fit one tile."""
FEW = 16
"""Most rows that fit two tiles, one for each part."""

_AHEAD = 3  # tiles that are widened before one is loaded: by then its rows have left the store buffer
_RING = 4  # tiles of widened weights; rows that are 4 KiB apart would look alike to the processor's load unit
_SUMS = _RING * TILE
FEW_FLOATS = _SUMS + 4 * TILE
"""Scratch memory of `few_rows`: a ring of weights, four tiles of sums."""

PAIR_FLOATS = 4 * TILE
"""Scratch memory of `tile_panel`: four tiles of sums."""

BLOCK = 128  # k that every scaled format's K' is a multiple of
_STEPS = BLOCK // STEP


def few_floats(rows: int, padded: int) -> int:
    """Floats of the split rows of x for `few_rows`."""
    return rows * padded


def _widen(fmt: Format, w: Any, start: Any, target: Any, at: Any, distance: Any = None) -> None:
    """The 32 k that begin at word `start` of w as a BF16 tile, 4-byte lanes `at` of target; the words at `distance`, if
    any, are prefetched."""
    rows = fmt.per_lane // 2
    lines = []
    for u in range(LANES // rows):
        line = T.Bind(start + u * ROWS)
        if distance is not None:
            prefetch(w, line + distance)
        lines.append(T.Bind(w.vload([line], "int32x16")))

    def put(u: int, values: list[Any]) -> None:
        for r, row in enumerate(values):
            T.buffer_store(target, row, [T.ramp(at + (u * rows + r) * LANES, 1, LANES)])

    amx.weight_rows(fmt, lines, put)


@cache
def few_rows(fmt: Format, wide: bool, machine: Machine) -> Kernel:
    """out[tiles, m, 16] = x[m, k'] . (packed tiles that follow each other, side by side)^T for m <= NARROW, tiles
    configured for 2m rows; `wide`: for m <= FEW, tiles configured for m rows.

    Parameters: w int32[tiles, k'/q * 16], scale (scaled formats only), x (split rows: for each 32 k, m high and m
    low rows of a tile), out f32[tiles, m, 16], scratch f32[FEW_FLOATS], tiles, m, k' (i32).
    """
    name = f"few_rows_{fmt.name}{'_wide' if wide else ''}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("w", "int32", (1 << 30,))]
    params += [("scale", fmt.scale_dtype, (1 << 20,))] if fmt.scale_block else []
    params += [(n, "float32", (1 << 30,)) for n in ("x", "out", "scratch")]
    params += [(n, "int32") for n in ("tiles", "m", "k")]
    with kernel_body(kernel, params) as args:
        w, *scales, x, out, scratch, tiles, m, k = args
        with T.serial(0, tiles * m) as r:
            T.buffer_store(out, splat(0.0, LANES), [T.ramp(r * LANES, 1, LANES)])
        _FewRows(fmt, wide, w, scales, x, out, scratch, tiles, m, k).emit()
    return kernel


class _FewRows:
    """Emits the body of `few_rows`: block by block of k, in each tile by tile."""

    def __init__(
        self, fmt: Format, wide: bool, w: Any, scales: list[Any], x: Any, out: Any, scratch: Any, tiles: Any, m: Any,
        k: Any,
    ) -> None:  # fmt: skip
        self.fmt, self.wide, self.w, self.scales, self.x, self.out, self.scratch = fmt, wide, w, scales, x, out, scratch
        self.tiles, self.m = tiles, m
        self.steps = T.Bind(k // STEP)
        self.words = T.Bind(k // fmt.per_lane * ROWS)
        self.x_step = T.Bind(m * (2 * LANES))
        self.parts = BLOCK // (fmt.scale_block or BLOCK)
        self.block_words = BLOCK // fmt.per_lane * ROWS

    def emit(self) -> None:
        """All products."""
        if not self.fmt.scale_block:
            with T.serial(0, (self.steps + _STEPS - 1) // _STEPS) as b, T.serial(0, self.tiles) as t:
                self._unscaled(b, t)
            return
        blocks = T.Bind(self.steps // _STEPS)
        for j in range(_AHEAD):
            self._widen(const(0), const(0), j)
        with T.serial(0, blocks) as b, T.serial(0, self.tiles) as t:
            start = T.Bind(t * self.words + b * self.block_words)
            more, last = t + 1 < self.tiles, b + 1 == blocks
            after = T.Bind(T.Select(more, start + self.words, T.Select(last, start, (b + 1) * self.block_words)))
            self._scaled(b, t, blocks, start, after, T.Bind(T.Select(more, b, T.min(b + 1, blocks - 1))))

    def _unscaled(self, b: Any, t: Any) -> None:
        """Up to four steps of weights that are tiles as they lie."""
        amx.zero(0)
        first = T.Bind(b * _STEPS)
        with T.serial(0, T.min(self.steps - first, _STEPS)) as i:
            j = T.Bind(first + i)
            amx.load(6, T.address_of(self.w[t * self.words + j * TILE]))
            self._multiply(j, 4, 0, 6)
        self._add(t, [splat(1.0, LANES)])

    def _scaled(self, b: Any, t: Any, blocks: Any, start: Any, after: Any, block_after: Any) -> None:
        """Block b of tile t, whose words begin at `start`: sums in a tile for each scale block. Meanwhile the first
        steps of what follows `after` are widened."""
        scale = T.Bind((t * blocks + b) * (self.parts * self.fmt.block_scales))
        # The scales are another, slower stream, which no hardware follows: those of the next tiles.
        prefetch(self.scales[0], scale + self.tiles * blocks * (self.parts * self.fmt.block_scales))
        for part in range(self.parts):
            amx.zero(part)
        for j in range(_STEPS):
            if j + _AHEAD < _STEPS:
                self._widen(start, b, j + _AHEAD)
            else:
                self._widen(after, block_after, j + _AHEAD - _STEPS)
            amx.load(6 + j % 2, T.address_of(self.scratch[j % _RING * TILE]))
            self._multiply(b * _STEPS + j, 4 + j % 2, j * self.parts // _STEPS, 6 + j % 2)
        factors = range(self.parts)
        self._add(t, [T.Bind(block_scale(self.fmt, self.scales[0], scale, p, 0, LANES)) for p in factors])

    def _widen(self, start: Any, block: Any, j: int) -> None:
        """Step j of the block, whose words begin at `start`, into its place in the ring."""
        distance = ahead(block * self.block_words, self.words, self.tiles)
        at = T.Bind(start + j * (STEP // self.fmt.per_lane * ROWS))
        _widen(self.fmt, self.w, at, self.scratch, j % _RING * TILE, distance)

    def _multiply(self, j: Any, x_tile: int, sums: int, weights: int) -> None:
        """sums += both parts of the 32 k of step j times a tile of weights."""
        amx.load(x_tile, T.address_of(self.x[j * self.x_step]))
        amx.dot(sums, x_tile, weights)
        if self.wide:
            amx.load(x_tile, T.address_of(self.x[j * self.x_step + self.m * LANES]))
            amx.dot(sums, x_tile, weights)

    def _add(self, t: Any, factors: list[Any]) -> None:
        """out += the sums of both parts of x, each tile of sums times its factor."""
        scratch, m = self.scratch, self.m
        for part in range(len(factors)):
            amx.store(part, T.address_of(scratch[_SUMS + part * TILE]))
        with T.serial(0, m) as r:
            at = T.Bind((t * m + r) * LANES)
            total = self.out.vload([at], "float32x16")
            for part, factor in enumerate(factors):
                value = scratch.vload([_SUMS + part * TILE + r * LANES], "float32x16")
                if not self.wide:
                    value = value + scratch.vload([_SUMS + part * TILE + (m + r) * LANES], "float32x16")
                total = total + value * factor
            T.buffer_store(self.out, total, [T.ramp(at, 1, LANES)])


@cache
def tile_weights(fmt: Format, machine: Machine) -> Kernel:
    """panel = one packed tile's k' columns as BF16 tiles. Parameters: w int32, panel f32, k' (i32)."""
    name = f"tile_weights_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("w", "int32", (1 << 30,)), ("panel", "float32", (1 << 24,)), ("k", "int32")]
    with kernel_body(kernel, params) as (w, panel, k), T.serial(0, (k + STEP - 1) // STEP) as tile:
        start = T.Bind(tile * (STEP // fmt.per_lane * ROWS))
        _widen(fmt, w, start, panel, tile * TILE)
    return kernel


@cache
def tile_panel(fmt: Format, machine: Machine) -> Kernel:
    """c[16 * tiles, 32] += x . panel, two weight tiles side by side; tiles configured for 16 rows. Meanwhile the words
    that will be widened next come into the caches: `lines` lines of 64 bytes from each of next0 and next1 on.

    Parameters: panel (BF16 tiles [2][k'/32], `stride` lanes from the first weight tile's to the second's), scale0,
    scale1 (scaled formats only), x (split rows [tiles][k'/32][high, low] tiles, `x_stride` lanes from one tile's
    to the next's), c f32, scratch f32[PAIR_FLOATS], next0, next1, tiles, k' (i32, a multiple of 32; of 128 with
    scales), stride, x_stride, lines.
    """
    name = f"tile_panel_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("panel", "float32", (1 << 30,))]
    params += [(f"scale{i}", fmt.scale_dtype, (1 << 20,)) for i in range(2)] if fmt.scale_block else []
    params += [(n, "float32", (1 << 30,)) for n in ("x", "c", "scratch")]
    params += [(f"next{i}", "int32", (1 << 30,)) for i in range(2)]
    params += [(n, "int32") for n in ("tiles", "k", "stride", "x_stride", "lines")]
    with kernel_body(kernel, params) as args:
        panel, *scales, x, c, scratch, next0, next1, tiles, k, stride, x_stride, lines = args
        steps = T.Bind(k // STEP)

        def multiply(first: Any, height: int, j: Any) -> None:
            for side in range(2):
                amx.load(6 + side, T.address_of(panel[j * TILE + side * stride]))
            for part in range(2):
                for r in range(height):
                    amx.load(4 + r, T.address_of(x[(first + r) * x_stride + (j * 2 + part) * TILE]))
                    for side in range(2):
                        amx.dot(2 * r + side, 4 + r, 6 + side)

        def at(first: Any, r: int, side: int) -> Any:
            return (first + r) * (2 * TILE) + side * LANES

        def strip(first: Any, height: int) -> None:
            sums = [(r, side) for r in range(height) for side in range(2)]
            if not fmt.scale_block:
                for r, side in sums:
                    amx.load(2 * r + side, T.address_of(c[at(first, r, side)]), 128)
                with T.serial(0, steps) as j:
                    multiply(first, height, j)
                for r, side in sums:
                    amx.store(2 * r + side, T.address_of(c[at(first, r, side)]), 128)
                return
            with T.serial(0, k // fmt.scale_block) as b:
                for r, side in sums:
                    amx.zero(2 * r + side)
                for j in range(fmt.scale_block // STEP):
                    multiply(first, height, b * (fmt.scale_block // STEP) + j)
                for r, side in sums:
                    amx.store(2 * r + side, T.address_of(scratch[(2 * r + side) * TILE]))
                factors = [T.Bind(block_scale(fmt, s, 0, b, 0, LANES)) for s in scales]
                for r, side in sums:
                    with T.serial(0, 16) as i:
                        place = at(first, r, side) + i * 2 * LANES
                        value = scratch.vload([(2 * r + side) * TILE + i * LANES], "float32x16") * factors[side]
                        total = c.vload([place], "float32x16") + value
                        T.buffer_store(c, total, [T.ramp(place, 1, LANES)])

        pairs = T.Bind(tiles // 2)
        with T.serial(0, pairs) as pair:
            # As many at a time as a core can wait for: together they would hold up the products.
            begin, end = T.Bind(pair * lines // pairs), T.Bind((pair + 1) * lines // pairs)
            with T.serial(begin, end) as line:
                prefetch(next0, line * ROWS)
                prefetch(next1, line * ROWS)
            strip(T.Bind(pair * 2), 2)
        with T.If(tiles % 2 == 1), T.Then():
            strip(T.Bind(tiles - 1), 1)
    return kernel
