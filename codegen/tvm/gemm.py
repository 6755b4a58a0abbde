"""Pieces of the blocked product: unpacking a weight panel to fp32, and the register-tile kernel that runs over it."""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.blocking import PAD, Blocking, blocking
from moec.codegen.tvm.decode import block_scale, decoder
from moec.codegen.tvm.gemv import PREFETCH_BYTES, STEP, prefetch
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, const, kernel_body, variables
from moec.ir.lane16 import ROWS, Format


@cache
def copy_row(machine: Machine) -> Kernel:
    """target[:n] = source[:n] * factor, target[n:padded] = 0.

    Parameters: source, target, n, padded (i32), factor (f32).
    """
    kernel = Kernel("copy_row", tvm.ir.GlobalVar("copy_row"))
    lanes = machine.lanes
    params: list[Param] = [("source", "float32", (1 << 30,)), ("target", "float32", (1 << 30,))]
    params += [("n", "int32"), ("padded", "int32"), ("factor", "float32")]
    with kernel_body(kernel, params) as (source, target, n, padded, factor):
        whole = T.Bind(n // lanes)
        with T.serial(0, whole) as i:
            o = i * lanes
            value = source.vload([o], f"float32x{lanes}") * T.broadcast(factor, lanes)
            T.buffer_store(target, value, [T.ramp(o, 1, lanes)])
        with T.serial(0, n - whole * lanes) as i:
            T.buffer_store(target, source[whole * lanes + i] * factor, [whole * lanes + i])
        with T.serial(0, padded - n) as i:
            T.buffer_store(target, const(0.0, "float32"), [n + i])
    return kernel


@cache
def unpack_tile(fmt: Format, machine: Machine) -> Kernel:
    """panel[kk, :16] = k' columns of one packed tile, times scale and `Decoder.pre`; rows of the panel are `columns`
    wide.

    Parameters: w int32, scale f32 (scaled formats only), panel f32, k' (i32, a multiple of `fmt.k_multiple`).
    """
    name = f"unpack_tile_{fmt.name}"
    kernel = Kernel(name, tvm.ir.GlobalVar(name))
    lanes, columns = machine.lanes, blocking(machine).columns
    block, decode = fmt.scale_block or STEP, decoder(fmt, machine)
    params: list[Param] = [("w", "int32", (1 << 30,))]
    params += [("scale", fmt.scale_dtype, (1 << 20,))] if fmt.scale_block else []
    params += [("panel", "float32", (1 << 24,)), ("k", "int32")]
    with kernel_body(kernel, params) as (w, *scales, panel, k), T.serial(0, k // block) as b:
        if fmt.scale_block:
            pre = T.broadcast(const(decode.pre, "float32"), lanes)
            factors = [T.Bind(block_scale(fmt, scales[0], 0, b, first, lanes) * pre) for first in range(0, ROWS, lanes)]
        with T.serial(0, block // fmt.per_lane) as i:
            group = T.Bind(b * (block // fmt.per_lane) + i)
            prefetch(w, group * ROWS + PREFETCH_BYTES // 4)
            for h in range(ROWS // lanes):
                v = T.Bind(w.vload([group * ROWS + h * lanes], f"int32x{lanes}"))
                for j, value in enumerate(decode.unpack(v, lanes)):
                    at = T.ramp((group * fmt.per_lane + j) * columns + h * lanes, 1, lanes)
                    T.buffer_store(panel, value * factors[h] if fmt.scale_block else value, [at])
    return kernel


@cache
def panel_product(machine: Machine) -> Kernel:
    """c[:rows, columns] += x[:rows, :k] . panel[:k, columns], by register tiles of at most `mr` rows.

    Parameters: panel f32[k, columns], x f32[rows, kc + PAD], c f32[rows, columns], rows, k (i32). Rows are dealt
    evenly to the tiles, so that no tile is so low that it waits for its own sums.
    """
    kernel = Kernel("panel_product", tvm.ir.GlobalVar("panel_product"))
    sizes = blocking(machine)
    params: list[Param] = [(name, "float32", (1 << 24,)) for name in ("panel", "x", "c")]
    params += [("rows", "int32"), ("k", "int32")]
    with kernel_body(kernel, params) as (panel, x, c, rows, k):
        tiles = T.Bind((rows + sizes.mr - 1) // sizes.mr)
        low, higher = T.Bind(rows // tiles), T.Bind(rows % tiles)
        with T.serial(0, tiles) as t:
            first = T.Bind(t * low + T.min(t, higher))
            height = T.Bind(low + T.Select(t < higher, const(1), const(0)))
            for mr in range(1, sizes.mr + 1):
                with T.If(height == mr), T.Then():
                    _register_tile(panel, x, c, first, mr, k, sizes, machine.lanes)
    return kernel


def _register_tile(panel: Any, x: Any, c: Any, first: Any, mr: int, k: Any, sizes: Blocking, lanes: int) -> None:
    vectors, columns, ldx = sizes.vectors, sizes.columns, sizes.kc + PAD
    acc = variables(mr * vectors, f"float32x{lanes}")

    def at(r: int, h: int) -> Any:
        return (first + r) * columns + h * lanes

    for r in range(mr):
        for h in range(vectors):
            assign(acc[r * vectors + h], c.vload([at(r, h)], f"float32x{lanes}"))
    with T.serial(0, k) as kk:
        b = [T.Bind(panel.vload([kk * columns + h * lanes], f"float32x{lanes}")) for h in range(vectors)]
        for r in range(mr):
            a = T.Bind(T.broadcast(x[(first + r) * ldx + kk], lanes))
            for h in range(vectors):
                i = r * vectors + h
                assign(acc[i], acc[i][0] + a * b[h])
    for r in range(mr):
        for h in range(vectors):
            T.buffer_store(c, acc[r * vectors + h][0], [T.ramp(at(r, h), 1, lanes)])
