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
from moec.codegen.tvm.gemv import PREFETCH_BYTES, prefetch
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


def _widen(fmt: Format, w: Any, tile: Any, target: Any, at: Any) -> None:
    """The 32 k of a tile as BF16; 4-byte lanes `at` of target."""
    rows = fmt.per_lane // 2
    for u in range(LANES // rows):
        line = T.Bind((tile * (LANES // rows) + u) * ROWS)
        prefetch(w, line + PREFETCH_BYTES // 4)
        for r, row in enumerate(amx.weight_rows(fmt, T.Bind(w.vload([line], "int32x16")))):
            T.buffer_store(target, row, [T.ramp(at + (u * rows + r) * LANES, 1, LANES)])


@cache
def few_rows(fmt: Format, wide: bool, machine: Machine) -> Kernel:
    """out[m, 16] = x[m, k'] . (one packed tile)^T for m <= NARROW, tiles configured for 2m rows; `wide`: for m <= FEW,
    tiles configured for m rows.

    Parameters: w int32[k'/q * 16], scale (scaled formats only), x (split rows: for each 32 k, m high and m
    low rows of a tile), out f32[m, 16], scratch f32[FEW_FLOATS], m, k' (i32).
    """
    name = f"few_rows_{fmt.name}{'_wide' if wide else ''}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("w", "int32", (1 << 30,))]
    params += [("scale", fmt.scale_dtype, (1 << 20,))] if fmt.scale_block else []
    params += [(n, "float32", (1 << 30,)) for n in ("x", "out", "scratch")] + [("m", "int32"), ("k", "int32")]
    with kernel_body(kernel, params) as (w, *scales, x, out, scratch, m, k):
        step = T.Bind(m * (2 * LANES))
        parts = BLOCK // (fmt.scale_block or BLOCK)

        def multiply(j: Any, x_tile: int, sums: int, weights: int) -> None:
            """sums += both parts of the 32 k of step j times a tile of weights."""
            amx.load(x_tile, T.address_of(x[j * step]))
            amx.dot(sums, x_tile, weights)
            if wide:
                amx.load(x_tile, T.address_of(x[j * step + m * LANES]))
                amx.dot(sums, x_tile, weights)

        def widen(tile: Any, slot: int) -> None:
            with T.If(tile < k // STEP), T.Then():
                _widen(fmt, w, tile, scratch, slot * TILE)

        def product(b: Any) -> None:
            """Sums of the 128 k of block b, a tile for each scale block."""
            for part in range(parts):
                amx.zero(part)
            for j in range(_STEPS):
                widen(b * _STEPS + j + _AHEAD, (j + _AHEAD) % _RING)
                amx.load(6 + j % 2, T.address_of(scratch[j % _RING * TILE]))
                multiply(b * _STEPS + j, 4 + j % 2, j * parts // _STEPS, 6 + j % 2)

        def add(factors: list[Any]) -> None:
            """out += the sums of both parts of x, each tile of sums times its factor."""
            for part in range(len(factors)):
                amx.store(part, T.address_of(scratch[_SUMS + part * TILE]))
            with T.serial(0, m) as r:
                total = out.vload([r * LANES], "float32x16")
                for part, factor in enumerate(factors):
                    value = scratch.vload([_SUMS + part * TILE + r * LANES], "float32x16")
                    if not wide:
                        value = value + scratch.vload([_SUMS + part * TILE + (m + r) * LANES], "float32x16")
                    total = total + value * factor
                T.buffer_store(out, total, [T.ramp(r * LANES, 1, LANES)])

        with T.serial(0, m) as r:
            T.buffer_store(out, splat(0.0, LANES), [T.ramp(r * LANES, 1, LANES)])
        if not fmt.scale_block:
            amx.zero(0)
            with T.serial(0, k // STEP) as j:
                amx.load(6, T.address_of(w[j * TILE]))
                multiply(j, 4, 0, 6)
            add([splat(1.0, LANES)])
        else:
            for tile in range(_AHEAD):
                widen(const(tile), tile)
            with T.serial(0, k // BLOCK) as b:
                # The scales are another, slower stream, which no hardware follows: those of the next tile.
                prefetch(scales[0], (k // BLOCK + b) * (parts * fmt.block_scales))
                product(b)
                add([T.Bind(block_scale(fmt, scales[0], 0, b * parts + p, 0, LANES)) for p in range(parts)])
    return kernel


@cache
def tile_weights(fmt: Format, machine: Machine) -> Kernel:
    """panel = one packed tile's k' columns as BF16 tiles. Parameters: w int32, panel f32, k' (i32)."""
    name = f"tile_weights_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("w", "int32", (1 << 30,)), ("panel", "float32", (1 << 24,)), ("k", "int32")]
    with kernel_body(kernel, params) as (w, panel, k), T.serial(0, (k + STEP - 1) // STEP) as tile:
        _widen(fmt, w, tile, panel, tile * TILE)
    return kernel


@cache
def tile_panel(fmt: Format, machine: Machine) -> Kernel:
    """c[16 * tiles, 32] += x . panel, two weight tiles side by side; tiles configured for 16 rows.

    Parameters: panel (BF16 tiles [2][k'/32], `stride` lanes from the first weight tile's to the second's), scale0,
    scale1 (scaled formats only), x (split rows [tiles][k'/32][high, low] tiles), c f32, scratch
    f32[PAIR_FLOATS], tiles, k' (i32, a multiple of 32; of 128 with scales), stride.
    """
    name = f"tile_panel_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [("panel", "float32", (1 << 30,))]
    params += [(f"scale{i}", fmt.scale_dtype, (1 << 20,)) for i in range(2)] if fmt.scale_block else []
    params += [(n, "float32", (1 << 30,)) for n in ("x", "c", "scratch")]
    params += [("tiles", "int32"), ("k", "int32"), ("stride", "int32")]
    with kernel_body(kernel, params) as (panel, *scales, x, c, scratch, tiles, k, stride):
        steps = T.Bind(k // STEP)
        per_tile = T.Bind(steps * (2 * TILE))

        def multiply(first: Any, height: int, j: Any) -> None:
            for side in range(2):
                amx.load(6 + side, T.address_of(panel[j * TILE + side * stride]))
            for part in range(2):
                for r in range(height):
                    amx.load(4 + r, T.address_of(x[(first + r) * per_tile + (j * 2 + part) * TILE]))
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

        with T.serial(0, tiles // 2) as pair:
            strip(T.Bind(pair * 2), 2)
        with T.If(tiles % 2 == 1), T.Then():
            strip(T.Bind(tiles - 1), 1)
    return kernel
