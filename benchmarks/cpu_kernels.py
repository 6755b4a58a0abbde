"""Rates of the CPU matrix kernels beside what bounds them: a pure read of the same weights, FMA peak, and torch fp32.

Run: python benchmarks/cpu_kernels.py [--small] [--json]. Times are the best of alternated rounds: on a shared machine
trust the ratios. Weights of one shape are rotated through a pool far larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Pools of TVM and OpenMP that spin against each other would time each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))
# The calling thread is bound to no core, and starts beside the one that a bound thread waits on.
os.environ.setdefault("TVM_BIND_THREADS", "0")

import numpy as np
import torch
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moec import targets
from moec.codegen.tvm import amx
from moec.codegen.tvm.compile import machine_of
from moec.codegen.tvm.gemv import PREFETCH_BYTES, prefetch
from moec.codegen.tvm.linear import LinearSpec, build, scratch_size
from moec.codegen.tvm.tir import (
    Kernel,
    Machine,
    Param,
    assign,
    build_module,
    call,
    compile_module,
    const,
    kernel_body,
    splat,
    variables,
)
from moec.ir.lane16 import FORMATS, ROWS, Format
from moec.runtime.machine import allow_tiles

Shape = tuple[int, int]


def read_kernel(machine: Machine) -> Kernel:
    """The sum of `lines` cache lines of 16 lanes, read by all cores."""
    kernel = Kernel("read_lines", tvm.ir.GlobalVar("read_lines"))
    params: list[Param] = [("w", "int32", (1 << 40,)), ("out", "int32", (1 << 16,)), ("lines", "int32")]
    lanes, vectors = machine.lanes, ROWS // machine.lanes
    with kernel_body(kernel, params) as (w, out, lines), T.parallel(0, machine.cores) as part:
        first, last = T.Bind(part * (lines // machine.cores)), T.Bind((part + 1) * (lines // machine.cores))
        sums = variables(2 * vectors, f"int32x{lanes}")
        for s in sums:
            assign(s, splat(0, lanes, "int32"))
        with T.serial(0, (last - first) // 2) as i:
            for j, s in enumerate(sums):
                at = T.Cast("int64", first + i * 2) * ROWS + j * lanes
                prefetch(w, at + PREFETCH_BYTES // 4)
                assign(s, s[0] + w.vload([at], f"int32x{lanes}"))
        total = sums[0][0]
        for s in sums[1:]:
            total = total + s[0]
        T.buffer_store(out, total, [T.ramp(part * lanes, 1, lanes)])
    return kernel


_SETTLED = 40  # calls until the system has given every thread a core of its own
_SUMS = 12  # independent sums: two units, each with a result after four cycles, need eight


def fma_kernel(machine: Machine) -> Kernel:
    """`repeats` times `_SUMS` vectors of multiply-adds on registers, on every core."""
    kernel = Kernel("fma_peak", tvm.ir.GlobalVar("fma_peak"))
    params: list[Param] = [("x", "float32", (1 << 30,)), ("out", "float32", (1 << 30,)), ("repeats", "int32")]
    with kernel_body(kernel, params) as (x, out, repeats), T.parallel(0, machine.cores) as part:
        factor, term = (T.Bind(T.broadcast(x[i], machine.lanes)) for i in range(2))
        sums = variables(_SUMS, f"float32x{machine.lanes}")
        for s in sums:
            assign(s, term)
        with T.serial(0, repeats):
            for s in sums:
                assign(s, s[0] * factor + term)
        for i, s in enumerate(sums):
            T.buffer_store(out, s[0], [T.ramp((part * _SUMS + i) * machine.lanes, 1, machine.lanes)])
    return kernel


def dot_kernel(machine: Machine) -> Kernel:
    """`repeats` times four products of matrix tiles (`amx`) on registers, on every core."""
    kernel = Kernel("tile_peak", tvm.ir.GlobalVar("tile_peak"))
    params: list[Param] = [("x", "float32", (1 << 30,)), ("out", "float32", (1 << 30,)), ("repeats", "int32")]
    with kernel_body(kernel, params) as (x, out, repeats), T.parallel(0, machine.cores) as part:
        amx.configure(const(16))
        for tile in range(4):
            amx.zero(tile)
            amx.load(4 + tile, T.address_of(x[0]))
        with T.serial(0, repeats):
            for tile in range(4):
                amx.dot(tile, 4 + tile // 2, 6 + tile % 2)
        for tile in range(4):
            amx.store(tile, T.address_of(out[(part * 4 + tile) * amx.TILE]))
        amx.release()
    return kernel


def exported(name: str, kernel: Kernel) -> Any:
    """A program that passes (tensor, first element) pairs and scalars on to `kernel`."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name})
        arguments = []
        for i, p in enumerate(kernel.func.params):
            if hasattr(p.ty, "element_type"):
                buffer = T.match_buffer(T.arg(f"p{i}", T.handle()), (T.int64(),), str(p.ty.element_type), align=4)
                arguments.append(T.address_of(buffer[T.arg(f"o{i}", T.int64())]))
            else:
                arguments.append(T.arg(f"n{i}", T.int32()))
        call(kernel, *arguments)
    return builder.get()


def compiled(kernel: Kernel, machine: Machine) -> Callable[..., None]:
    """`kernel` as a Python function."""
    module = build_module([kernel], {"main": exported("main", kernel)})
    main: Callable[..., None] = compile_module(module, machine)["main"]
    return main


def best(run: Callable[[int], None], rounds: int, copies: int) -> float:
    """Least seconds of one call over `rounds` passes through the pool."""
    seconds = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for c in range(copies):
            run(c)
        seconds = min(seconds, (time.perf_counter() - start) / copies)
    return seconds


def fma_peak(machine: Machine, rounds: int) -> float:
    """GFLOP/s of all cores by multiply-adds of FP32 vectors."""
    return _peak(fma_kernel(machine), machine, machine.cores * _SUMS * 2 * machine.lanes, rounds)


def tile_peak(machine: Machine, rounds: int) -> float:
    """GFLOP/s of all cores by matrix tiles of BF16; 0 without them."""
    return _peak(dot_kernel(machine), machine, machine.cores * 4 * 2 * 16 * 16 * 32, rounds) if machine.tiles else 0.0


def _peak(kernel: Kernel, machine: Machine, flops: int, rounds: int) -> float:
    main = compiled(kernel, machine)
    x, out, repeats = torch.zeros(1 << 10), torch.zeros(1 << 16), 400_000
    seconds = best(lambda _: main(x, 0, out, 0, repeats), _SETTLED + 4 * rounds, 1)
    return repeats * flops / seconds / 1e9


def pool_of(lanes: int) -> torch.Tensor:
    """int32 lanes in huge pages, bytes of moderate E4M3 and BF16 values alike; no kernel's time depends on them."""
    # Shared memory, the default of `mmap`, gets no huge pages.
    memory = mmap.mmap(-1, 4 * lanes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pool = np.frombuffer(memory, dtype=np.int32, count=lanes)
    drawn = np.random.default_rng(0).integers(0x30303030, 0x3F3F3F3F, min(lanes, 1 << 22), dtype=np.int32)
    for start in range(0, lanes, len(drawn)):
        pool[start : start + len(drawn)] = drawn[: lanes - start]
    return torch.from_numpy(pool)


def read_bandwidth(machine: Machine, rounds: int, nbytes: int = 1 << 30) -> float:
    """Bytes a second that all cores read from huge pages, with the prefetches of the kernels."""
    read, pool = compiled(read_kernel(machine), machine), pool_of(nbytes // 4)
    sums = torch.zeros(1 << 16, dtype=torch.int32)
    return nbytes / best(lambda _: read(pool, 0, sums, 0, nbytes // 4 // ROWS), rounds, 1)


def measure(
    shape: Shape, fmt: Format, tokens: list[int], pool: int, rounds: int, machine: Machine
) -> list[dict[str, Any]]:
    """Rows of the table for one shape and format."""
    n, k = shape
    spec = LinearSpec(n, k, fmt, k, n, max(tokens))
    main, read = compiled(build(spec, machine), machine), compiled(read_kernel(machine), machine)
    lanes, scales = fmt.lanes(n, k), fmt.scales(n, k)
    copies = max(1, pool // (4 * lanes))
    weights = pool_of(copies * lanes)
    scale = torch.ones(max(1, copies * scales)) if not fmt.row_scales else torch.full((copies * scales,), 127).byte()
    scratch, sums = torch.zeros(scratch_size(spec, machine)), torch.zeros(1 << 16, dtype=torch.int32)
    dense = torch.randn(n, k)
    rows = []
    for t in tokens:
        x, y = torch.randn(t, k), torch.zeros(t, n)
        passes = copies if t <= 16 else min(copies, 2)

        def run(c: int, x: torch.Tensor = x, y: torch.Tensor = y, t: int = t) -> None:
            operands = [x.view(-1), 0, weights, c * lanes]
            operands += [scale, c * scales] if scales else []
            main(*operands, y.view(-1), 0, scratch, 0, t)

        def peer(_: int, x: torch.Tensor = x) -> None:
            torch.mm(x, dense.T)

        kernel_s = read_s = torch_s = float("inf")
        for _ in range(rounds):
            kernel_s = min(kernel_s, best(run, 1, passes))
            read_s = min(read_s, best(lambda c: read(weights, c * lanes, sums, 0, lanes // ROWS), 1, passes))
            torch_s = min(torch_s, best(peer, 1, 2))
        rows.append(
            {
                "format": fmt.name, "n": n, "k": k, "tokens": t, "us": kernel_s * 1e6,
                "gb_per_s": 4 * lanes / kernel_s / 1e9, "read_gb_per_s": 4 * lanes / read_s / 1e9,
                "gflop_per_s": 2 * t * n * k / kernel_s / 1e9, "torch_fp32_gflop_per_s": 2 * t * n * k / torch_s / 1e9,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--shapes", help="NxK,NxK (default: of experts and projections)")
    parser.add_argument("--tokens", help="numbers of rows, with commas between them")
    parser.add_argument("--formats", default="fp8_e4m3,bf16,fp4_e2m1", help=f"of {','.join(FORMATS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    allow_tiles()
    machine = machine_of(targets.load("cpu"))
    torch.set_num_threads(machine.cores)
    shapes: list[Shape] = [(512, 512)] if options.small else [(2048, 7168), (2816, 2048), (7168, 2048)]
    tokens = [1, 16] if options.small else [1, 2, 4, 8, 16, 64, 256, 1024]
    if options.shapes:
        shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in options.shapes.split(","))]
    if options.tokens:
        tokens = [int(t) for t in options.tokens.split(",")]
    # Larger than the last-level cache of most servers.
    rounds, pool = (1, 8 << 20) if options.small else (5, 1 << 30)
    peak, tile = fma_peak(machine, rounds), tile_peak(machine, rounds)
    rows = []
    for shape in shapes:
        for fmt in (FORMATS[name] for name in options.formats.split(",")):
            print(f"{shape[0]} x {shape[1]} {fmt.name}", file=sys.stderr)
            rows += measure(shape, fmt, tokens, pool, rounds, machine)
    if options.json:
        print(
            json.dumps(
                {"cores": machine.cores, "fma_peak_gflop_per_s": peak, "tile_peak_gflop_per_s": tile, "rows": rows}
            )
        )
        return
    tiles = f", of matrix tiles {tile:.0f} (BF16)" if tile else ""
    print(f"{machine.cores} cores, FMA peak {peak:.0f} GFLOP/s{tiles}")
    titles = ("us", "GB/s", "/read", "GFLOP/s", "/peak", "/torch")
    print(f"{'format':9} {'N':>5} {'K':>5} {'M':>5}", *[f"{t:>9}" for t in titles])
    for r in rows:
        values = (
            r["us"],
            r["gb_per_s"],
            r["gb_per_s"] / r["read_gb_per_s"],
            r["gflop_per_s"],
            r["gflop_per_s"] / peak,
            r["gflop_per_s"] / r["torch_fp32_gflop_per_s"],
        )
        print(f"{r['format']:9} {r['n']:5} {r['k']:5} {r['tokens']:5}", *[f"{v:9.2f}" for v in values])


if __name__ == "__main__":
    main()
