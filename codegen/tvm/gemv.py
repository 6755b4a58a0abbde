"""Row-lane product of one weight tile with a few rows of x: weights are read once and widened in registers.

`row_lane(fmt, m)` is the kernel behind every product with at most `Blocking.skinny` rows. At one row it runs at the
speed of memory; the prefetch distance covers the latency of DRAM and runs on into the next tile, which follows in
memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.decode import block_scale, decoder
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, kernel_body, splat, variables
from moec.ir.lane16 import ROWS, Format

PREFETCH_BYTES = 2048
STEP = 8  # k of one iteration, a divisor of every format's k_multiple


def prefetch(buffer: Any, index: Any) -> None:
    """Emit a prefetch of the line that holds `buffer[index]`, for reading, into all cache levels."""
    T.evaluate(T.Call("tirx.prefetch", [T.address_of(buffer[index]), 0, 3, 1], ret_ty="void"))


@cache
def row_lane(fmt: Format, m: int, machine: Machine) -> Kernel:
    """out[m, 16] = x[m, k'] . (one packed tile)^T, without `Decoder.post`.

    Parameters: w int32[k'/q * 16], scale (scaled formats only), x f32[m, ldx] already multiplied by
    `Decoder.pre` and zero beyond k, out f32[m, 16], ldx, k' (i32).
    """
    kernel = Kernel(f"row_lane_{fmt.name}_m{m}", tvm.ir.GlobalVar(f"row_lane_{fmt.name}_m{m}"))
    lanes, vectors = machine.lanes, ROWS // machine.lanes
    vtype = f"float32x{lanes}"
    # Two FMA pipes of latency four need eight independent sums.
    copies = max(1, min(STEP, machine.registers // 2 // (vectors * m)))
    sums = [(h, r) for h in range(vectors) for r in range(m)]
    params: list[Param] = [("w", "int32", (1 << 30,))]
    params += [("scale", fmt.scale_dtype, (1 << 20,))] if fmt.scale_block else []
    params += [("x", "float32", (1 << 30,)), ("out", "float32", (m * ROWS,)), ("ldx", "int32"), ("k", "int32")]
    with kernel_body(kernel, params) as args:
        w, *scales, x, out, ldx, k = args
        acc = variables(len(sums) * copies, vtype)

        def clear() -> None:
            for a in acc:
                assign(a, splat(0.0, lanes))

        def total(i: int) -> Any:
            value = acc[i * copies][0]
            for c in range(1, copies):
                value = value + acc[i * copies + c][0]
            return value

        def store(i: int, value: Any) -> None:
            h, r = sums[i]
            T.buffer_store(out, value, [T.ramp(r * ROWS + h * lanes, 1, lanes)])

        def accumulate(k0: Any) -> None:
            """acc += STEP k from k0 on."""
            for u in range(STEP // fmt.per_lane):
                line = T.Bind((k0 // fmt.per_lane + u) * ROWS)
                prefetch(w, line + PREFETCH_BYTES // 4)
                vs = [T.Bind(w.vload([line + h * lanes], f"int32x{lanes}")) for h in range(vectors)]
                parts = [[T.Bind(d) for d in decoder(fmt, machine).unpack(v, lanes)] for v in vs]
                for b in range(fmt.per_lane):
                    kk = u * fmt.per_lane + b
                    for r in range(m):
                        a = T.Bind(T.broadcast(x[r * ldx + k0 + kk], lanes))
                        for h in range(vectors):
                            i = sums.index((h, r)) * copies + kk % copies
                            assign(acc[i], acc[i][0] + parts[h][b] * a)

        if fmt.scale_block:
            totals = variables(len(sums), vtype)
            for t in totals:
                assign(t, splat(0.0, lanes))
            with T.serial(0, k // fmt.scale_block) as block:
                clear()
                with T.serial(0, fmt.scale_block // STEP) as step:
                    accumulate(block * fmt.scale_block + step * STEP)
                factors = [T.Bind(block_scale(fmt, scales[0], block, h * lanes, lanes)) for h in range(vectors)]
                for i, (h, _) in enumerate(sums):
                    assign(totals[i], totals[i][0] + total(i) * factors[h])
            for i in range(len(sums)):
                store(i, totals[i][0])
        else:
            clear()
            with T.serial(0, k // STEP) as step:
                accumulate(step * STEP)
            for i in range(len(sums)):
                store(i, total(i))
    return kernel
