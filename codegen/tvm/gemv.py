"""Row-lane product of weight tiles with a few rows of x: weights are read once and widened in registers.

`row_lane(fmt, m)` multiplies by one tile, `row_tiles(fmt, m)` by many that follow each other in memory: the kernels
behind every product with at most `Blocking.skinny` rows. A core's prefetchers follow each run of addresses on its own,
and one run does not fill its memory channel, so `row_tiles` reads several tiles side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.decode import block_scale, decoder
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, const, kernel_body, splat, variables
from moec.ir.lane16 import ROWS, Format

PREFETCH_BYTES = 2048
"""How far ahead of its use a weight is asked for, in each of the tiles that are read side by side."""
STREAMS = 4
"""Most tiles that are read side by side, a divisor of `BATCH`."""
BATCH = 16
"""Tiles whose results are kept together: a store to memory that is in no cache stops the stream of weights for a while,
several at once stop it once."""
STEP = 8  # k of one iteration, a divisor of every format's k_multiple


def prefetch(buffer: Any, index: Any) -> None:
    """Emit a prefetch of the line that holds `buffer[index]`, for reading, into all cache levels."""
    T.evaluate(T.Call("tirx.prefetch", [T.address_of(buffer[index]), 0, 3, 1], ret_ty="void"))


def weight_params(fmt: Format) -> list[Param]:
    """Parameters that hold packed weights: w, and scale in scaled formats."""
    scale: list[Param] = [("scale", fmt.scale_dtype, (1 << 30,))] if fmt.scale_block else []
    return [("w", "int32", (1 << 40,)), *scale]


@cache
def row_lane(fmt: Format, m: int, machine: Machine) -> Kernel:
    """out[m, 16] = x[m, k'] . (one packed tile)^T, without `Decoder.post`.

    Parameters: w int32[k'/q * 16], scale (scaled formats only), x f32[m, ldx] already multiplied by
    `Decoder.pre` and zero beyond k, out f32[m, 16], ldx, k' (i32).
    """
    kernel = Kernel(f"row_lane_{fmt.name}_m{m}", tvm.ir.GlobalVar(f"row_lane_{fmt.name}_m{m}"))
    params: list[Param] = [("x", "float32", (1 << 30,)), ("out", "float32", (m * ROWS,)), ("ldx", "int32")]
    with kernel_body(kernel, [*weight_params(fmt), *params, ("k", "int32")]) as args:
        *weights, x, out, ldx, k = args

        def store(tile: int, r: int, first: int, value: Any) -> None:
            T.buffer_store(out, value, [T.ramp(r * ROWS + first, 1, machine.lanes)])

        _Tiles(fmt, m, machine, 1, weights, x, ldx, k).emit(const(0, "int64"), store)
    return kernel


@cache
def row_tiles(fmt: Format, m: int, machine: Machine) -> Kernel:
    """out[tiles, m, 16]: `row_lane` for that many tiles, which follow each other in memory.

    Parameters: those of `row_lane`, and tiles (i32).
    """
    name = f"row_tiles_{fmt.name}_m{m}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    params: list[Param] = [(n, "float32", (1 << 40,)) for n in ("x", "out")]
    params += [(n, "int32") for n in ("ldx", "k", "tiles")]
    with kernel_body(kernel, [*weight_params(fmt), *params]) as args:
        *weights, x, out, ldx, k, tiles = args

        def group(first: Any, count: int) -> None:
            def store(tile: int, r: int, column: int, value: Any) -> None:
                at = T.Cast("int64", first + tile) * (m * ROWS) + (r * ROWS + column)
                T.buffer_store(out, value, [T.ramp(at, 1, machine.lanes)])

            _Tiles(fmt, m, machine, count, weights, x, ldx, k).emit(T.Cast("int64", first), store)

        in_groups(tiles, streams(m * (ROWS // machine.lanes), machine), group)
    return kernel


def streams(sums: int, machine: Machine) -> int:
    """How many tiles are read side by side when each has so many vectors of sums: these take half the registers."""
    count = STREAMS
    while count > 1 and count * sums > machine.registers // 2:
        count //= 2
    return count


def in_groups(tiles: Any, size: int, group: Callable[[Any, int], None]) -> None:
    """Emit `group(first tile, size)` for all whole groups of `tiles`, then `group(tile, 1)` for each that is left."""
    if size == 1:
        with T.serial(0, tiles) as tile:
            group(tile, 1)
        return
    whole = T.Bind(tiles // size)
    with T.serial(0, whole) as g:
        group(T.Bind(g * size), size)
    with T.serial(0, tiles - whole * size) as rest:
        group(T.Bind(whole * size + rest), 1)


def ahead(position: Any, tile: Any, count: Any) -> Any:
    """Words from `position` of a tile of `tile` words to what is to be prefetched: behind its end the run goes on in
    the next group of `count` tiles."""
    distance = PREFETCH_BYTES // 4
    groups = const(count - 1) if isinstance(count, int) else count - 1
    return T.Bind(T.Select(position + distance >= tile, groups, const(0)) * tile + distance)


class _Tiles:
    """Emits the products of `count` tiles that follow each other, side by side."""

    def __init__(
        self, fmt: Format, m: int, machine: Machine, count: int, weights: list[Any], x: Any, ldx: Any, k: Any
    ) -> None:
        self.fmt, self.m, self.machine, self.count = fmt, m, machine, count
        self.weights, self.x, self.ldx, self.k = weights, x, ldx, k
        vectors = ROWS // machine.lanes
        self.sums = [(t, h, r) for t in range(count) for h in range(vectors) for r in range(m)]
        # Two FMA pipes of latency four need eight independent sums.
        self.copies = max(1, min(STEP, machine.registers // 2 // len(self.sums)))

    def emit(self, first: Any, store: Callable[[int, int, int, Any], None]) -> None:
        """Products of the tiles from `first` (int64) on; `store(tile, row of x, first of the tile's rows, sums)`."""
        fmt, lanes, k = self.fmt, self.machine.lanes, self.k
        self.words = T.Bind(T.Cast("int64", k // fmt.per_lane * ROWS))
        self.starts = [T.Bind((first + t) * self.words) for t in range(self.count)]
        self.acc = variables(len(self.sums) * self.copies, f"float32x{lanes}")
        if not fmt.scale_block:
            self._clear()
            with T.serial(0, k // STEP) as step:
                self._accumulate(step * STEP, 1)
            for i, (t, h, r) in enumerate(self.sums):
                store(t, r, h * lanes, self._total(i))
            return
        per_tile = T.Bind(T.Cast("int64", k // fmt.scale_block * fmt.block_scales))
        scales = [T.Bind((first + t) * per_tile) for t in range(self.count)]
        totals = variables(len(self.sums), f"float32x{lanes}")
        for total in totals:
            assign(total, splat(0.0, lanes))
        with T.serial(0, k // fmt.scale_block) as block:
            self._clear()
            # The scales are another, slower stream, which no hardware follows: those of the next tiles.
            at = T.Cast("int64", block * fmt.block_scales) + per_tile * self.count
            for scale in scales:
                prefetch(self.weights[1], scale + at)
            self._accumulate(block * fmt.scale_block, fmt.scale_block // STEP)
            for i, (t, h, _) in enumerate(self.sums):
                factor = T.Bind(block_scale(fmt, self.weights[1], scales[t], block, h * lanes, lanes))
                assign(totals[i], totals[i][0] + self._total(i) * factor)
        for i, (t, h, r) in enumerate(self.sums):
            store(t, r, h * lanes, totals[i][0])

    def _clear(self) -> None:
        for a in self.acc:
            assign(a, splat(0.0, self.machine.lanes))

    def _total(self, i: int) -> Any:
        value = self.acc[i * self.copies][0]
        for c in range(1, self.copies):
            value = value + self.acc[i * self.copies + c][0]
        return value

    def _accumulate(self, first: Any, steps: int) -> None:
        """acc += so many times STEP k from `first` on."""
        position = T.Bind(T.Cast("int64", first // self.fmt.per_lane * ROWS))
        distance = ahead(position, self.words, self.count)

        def step(i: Any) -> None:
            for tile in range(self.count):
                self._step(tile, first + i * STEP, distance)

        if steps == 1:
            step(0)
        else:
            with T.serial(0, steps) as i:
                step(i)

    def _step(self, tile: int, k0: Any, distance: Any) -> None:
        """acc += STEP k of one tile from k0 on."""
        fmt, lanes, w = self.fmt, self.machine.lanes, self.weights[0]
        unpack = decoder(fmt, self.machine).unpack
        for u in range(STEP // fmt.per_lane):
            line = T.Bind(self.starts[tile] + T.Cast("int64", (k0 // fmt.per_lane + u) * ROWS))
            prefetch(w, line + distance)
            parts = []
            for h in range(ROWS // lanes):
                v = T.Bind(w.vload([line + h * lanes], f"int32x{lanes}"))
                parts.append([T.Bind(d) for d in unpack(v, lanes)])
            for b in range(fmt.per_lane):
                kk = u * fmt.per_lane + b
                for r in range(self.m):
                    a = T.Bind(T.broadcast(self.x[r * self.ldx + k0 + kk], lanes))
                    for h, part in enumerate(parts):
                        i = self.sums.index((tile, h, r)) * self.copies + kk % self.copies
                        assign(self.acc[i], self.acc[i][0] + part[b] * a)
