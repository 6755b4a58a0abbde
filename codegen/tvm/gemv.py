"""Row-lane product of one weight tile with a few rows of x: weights are read once and widened in registers.

`row_lane(fmt, m)` is the kernel behind every product with at most `Blocking.skinny` rows, `row_tiles` walks many tiles
for a chunk of rows. At one row that runs at the speed of memory; the prefetch distance covers the latency of DRAM and
runs on into the next tile, which follows in memory.
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

PREFETCH_BYTES = 8192
"""How far ahead of its use a weight is asked for: the time of more than a hundred lines lets a core that also computes
keep its memory channel busy."""
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

        def store(r: int, first: int, value: Any) -> None:
            T.buffer_store(out, value, [T.ramp(r * ROWS + first, 1, machine.lanes)])

        _tile(fmt, m, machine, weights, [const(0, "int64")] * 2, x, ldx, k, store)
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
        per_tile = [k // fmt.per_lane * ROWS, k // (fmt.scale_block or STEP) * fmt.block_scales]
        with T.serial(0, tiles) as tile:
            starts = [T.Bind(T.Cast("int64", tile) * size) for size in per_tile]

            def store(r: int, first: int, value: Any, tile: Any = tile) -> None:
                at = T.Cast("int64", tile) * (m * ROWS) + (r * ROWS + first)
                T.buffer_store(out, value, [T.ramp(at, 1, machine.lanes)])

            _tile(fmt, m, machine, weights, starts, x, ldx, k, store)
    return kernel


def _tile(
    fmt: Format, m: int, machine: Machine, weights: list[Any], starts: list[Any], x: Any, ldx: Any, k: Any,
    store: Callable[[int, int, Any], None],
) -> None:  # fmt: skip
    """Emit the products of the tile at `starts` of w and scale; `store(row of x, first of the tile's rows, sums)`."""
    lanes, vectors = machine.lanes, ROWS // machine.lanes
    vtype = f"float32x{lanes}"
    w, unpack = weights[0], decoder(fmt, machine).unpack
    # Two FMA pipes of latency four need eight independent sums.
    copies = max(1, min(STEP, machine.registers // 2 // (vectors * m)))
    sums = [(h, r) for h in range(vectors) for r in range(m)]
    acc = variables(len(sums) * copies, vtype)

    def clear() -> None:
        for a in acc:
            assign(a, splat(0.0, lanes))

    def total(i: int) -> Any:
        value = acc[i * copies][0]
        for c in range(1, copies):
            value = value + acc[i * copies + c][0]
        return value

    def accumulate(k0: Any) -> None:
        """acc += STEP k from k0 on."""
        for u in range(STEP // fmt.per_lane):
            line = T.Bind(starts[0] + T.Cast("int64", (k0 // fmt.per_lane + u) * ROWS))
            prefetch(w, line + PREFETCH_BYTES // 4)
            parts = []
            for h in range(vectors):
                v = T.Bind(w.vload([line + h * lanes], f"int32x{lanes}"))
                parts.append([T.Bind(d) for d in unpack(v, lanes)])
            for b in range(fmt.per_lane):
                kk = u * fmt.per_lane + b
                for r in range(m):
                    a = T.Bind(T.broadcast(x[r * ldx + k0 + kk], lanes))
                    for h in range(vectors):
                        i = sums.index((h, r)) * copies + kk % copies
                        assign(acc[i], acc[i][0] + parts[h][b] * a)

    if not fmt.scale_block:
        clear()
        with T.serial(0, k // STEP) as step:
            accumulate(step * STEP)
        for i, (h, r) in enumerate(sums):
            store(r, h * lanes, total(i))
        return
    totals = variables(len(sums), vtype)
    for t in totals:
        assign(t, splat(0.0, lanes))
    with T.serial(0, k // fmt.scale_block) as block:
        clear()
        # The scales are another, slower stream, which no hardware follows: those of the next tile.
        prefetch(weights[1], starts[1] + T.Cast("int64", (k // fmt.scale_block + block) * fmt.block_scales))
        with T.serial(0, fmt.scale_block // STEP) as step:
            accumulate(block * fmt.scale_block + step * STEP)
        for h in range(vectors):
            factor = T.Bind(block_scale(fmt, weights[1], starts[1], block, h * lanes, lanes))
            for i, (half, _) in enumerate(sums):
                if half == h:
                    assign(totals[i], totals[i][0] + total(i) * factor)
    for i, (h, r) in enumerate(sums):
        store(r, h * lanes, totals[i][0])
