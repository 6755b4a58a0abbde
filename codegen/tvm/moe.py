"""Around the routed experts' products: sorting tokens by expert, and combining the experts' results.

Sort (`SortSpec`):

    kernel(ids, offsets, row_token, row_of, tokens)

ids i32[tokens, top_k] -> offsets i32[experts + 1] (expert e owns the rows offsets[e] .. offsets[e + 1] - 1),
row_token i32[tokens * top_k] (the token of each row), row_of i32[tokens, top_k] (the row of each choice). Rows of one
expert stand in the order of their tokens.

Combine (`CombineSpec`):

    kernel(y, row_of, [weights], [shared], [residual], out, tokens)

out[t, :hidden] = sum_j weights[t, j] * y[row_of[t, j]] (+ shared[t]) (+ residual[t]); y f32[rows, ldy], weights
f32[tokens, top_k], shared f32[tokens, ld_shared], residual f32[tokens, ld_residual], out f32[tokens, ldo], which may
be shared or residual itself when their strides are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.matrix import SERIAL_PRODUCTS
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, const, kernel_body, parallel_kernel, variables
from moec.codegen.tvm.variant import UNBOUNDED

COLUMNS = 512  # of one unit of work in combine


@dataclass(frozen=True)
class SortSpec:
    """Static parameters of the sort."""

    experts: int
    top_k: int

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        return f"sort_by_expert_e{self.experts}_k{self.top_k}"


@cache
def build_sort(spec: SortSpec, machine: Machine) -> Kernel:
    """The sort kernel: a stable counting sort on the caller's core, whatever the machine."""
    kernel = Kernel(spec.name, tvm.ir.GlobalVar(spec.name))
    names = ("ids", "offsets", "row_token", "row_of")
    params: list[Param] = [*[(n, "int32", UNBOUNDED) for n in names], ("tokens", "int32")]
    with kernel_body(kernel, params) as (ids, offsets, row_token, row_of, tokens):
        with T.serial(0, spec.experts + 1) as e:
            T.buffer_store(offsets, const(0), [e])
        with T.serial(0, tokens * spec.top_k) as i:
            e = T.Bind(ids[i])
            T.buffer_store(offsets, offsets[e] + 1, [e])
        (start,) = variables(1, "int32")
        assign(start, const(0))
        with T.serial(0, spec.experts) as e:
            count = T.Bind(offsets[e])
            T.buffer_store(offsets, start[0], [e])
            assign(start, start[0] + count)
        with T.serial(0, tokens * spec.top_k) as i:
            e = T.Bind(ids[i])
            row = T.Bind(offsets[e])
            T.buffer_store(offsets, row + 1, [e])
            T.buffer_store(row_token, i // spec.top_k, [row])
            T.buffer_store(row_of, row, [i])
        # Every start has moved on to the next expert's.
        with T.serial(0, spec.experts) as i:
            T.buffer_store(offsets, offsets[spec.experts - 1 - i], [spec.experts - i])
        T.buffer_store(offsets, const(0), [0])
    return kernel


@dataclass(frozen=True)
class CombineSpec:
    """Static parameters of the combination; row strides in elements, 0 for an operand that is absent."""

    hidden: int
    top_k: int
    ldy: int
    ldo: int
    ld_shared: int = 0
    ld_residual: int = 0
    weighted: bool = True

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        strides = f"ldy{self.ldy}_lds{self.ld_shared}_ldr{self.ld_residual}_ldo{self.ldo}"
        strides += "" if self.weighted else "_plain"
        return f"combine_h{self.hidden}_k{self.top_k}_{strides}"


@cache
def build_combine(spec: CombineSpec, machine: Machine) -> Kernel:
    """The combination kernel."""
    added = [n for n, ld in (("shared", spec.ld_shared), ("residual", spec.ld_residual)) if ld]
    params: list[Param] = [("y", "float32", UNBOUNDED), ("row_of", "int32", UNBOUNDED)]
    params += [(n, "float32", UNBOUNDED) for n in (*(["weights"] if spec.weighted else []), *added, "out")]
    params += [("tokens", "int32")]
    worker = Kernel(f"{spec.name}_part", tvm.ir.GlobalVar(f"{spec.name}_part"))
    with kernel_body(worker, [*params, ("part", "int32"), ("parts", "int32")]) as args:
        named = dict(zip([p[0] for p in params], args, strict=False))
        part, parts = args[-2:]
        blocks = -(-spec.hidden // COLUMNS)
        units = T.Bind(T.Cast("int64", named["tokens"]) * blocks)
        first, last = T.Bind(part * units // parts), T.Bind((part + 1) * units // parts)
        with T.serial(0, T.Cast("int32", last - first)) as i:
            unit = T.Bind(first + i)
            _combine_block(spec, named, unit // blocks, T.Cast("int32", unit % blocks) * COLUMNS, machine.lanes)
    threshold = SERIAL_PRODUCTS // (spec.hidden * spec.top_k)
    return parallel_kernel(spec.name, params, worker, machine, lambda args: args[-1] <= threshold)


def _combine_block(spec: CombineSpec, named: dict[str, Any], token: Any, column: Any, lanes: int) -> None:
    """out[token, column : column + COLUMNS], cut off at `hidden`."""
    token, column = T.Bind(token), T.Bind(column)
    choices = [token * spec.top_k + j for j in range(spec.top_k)]
    weights = [T.Bind(named["weights"][c]) if spec.weighted else const(1.0, "float32") for c in choices]
    rows = [T.Bind(T.Cast("int64", named["row_of"][c]) * const(spec.ldy, "int64") + column) for c in choices]
    strides = {"shared": spec.ld_shared, "residual": spec.ld_residual, "out": spec.ldo}
    starts = {n: T.Bind(token * ld + column) for n, ld in strides.items() if ld}

    def element(offset: Any, width: int) -> None:
        def at(start: Any) -> Any:
            return T.ramp(start + offset, 1, width) if width > 1 else start + offset

        total: Any = None
        for weight, row in zip(weights, rows, strict=True):
            factor = T.broadcast(weight, width) if width > 1 else weight
            term = named["y"][at(row)] * factor
            total = term if total is None else total + term
        for name in ("shared", "residual"):
            if name in named:
                total = total + named[name][at(starts[name])]
        T.buffer_store(named["out"], total, [at(starts["out"])])

    length = T.Bind(T.min(spec.hidden - column, COLUMNS))
    with T.serial(0, length // lanes) as i:
        element(i * lanes, lanes)
    with T.serial(0, length % lanes) as i:
        element(length // lanes * lanes + i, 1)
