"""The driver shared by every matrix kernel: work division over cores and the choice of path by row count.

A product has groups (one for a linear layer, one per expert or head); group g multiplies its rows of x by its packed
weight. All cores walk the groups and take their share of the weight panels, so that each weight byte is read by one
core. Groups with up to `Blocking.skinny` rows go through `row_lane` in chunks; larger ones through unpacked panels and
`panel_product`.

Sizes and strides are run-time operands of the driver: a model has many shapes but few variants, and compile time goes
by variants. A kernel of a spec only adds its constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import amx
from moec.codegen.tvm.tile_worker import TileWorker
from moec.codegen.tvm.tir import Kernel, Machine, Param, call, const, kernel_body, parallel_kernel
from moec.codegen.tvm.variant import Variant, reach
from moec.codegen.tvm.worker import Worker
from moec.ir.lane16 import Format

SERIAL_PRODUCTS = 1 << 16  # below this many multiplications a second core costs more than it saves


def _worker(fmt: Format, machine: Machine) -> type[Worker]:
    return TileWorker if machine.tiles and amx.multiplies(fmt) else Worker


def core_floats(k: int, fmt: Format, max_rows: int, machine: Machine) -> int:
    """Scratch memory of one core, in floats: a weight panel, results, rows of x."""
    worker, limit = _worker(fmt, machine), reach(max_rows, machine)
    floats = worker.panel_size(limit, machine) + worker.result_size(limit, machine)
    # Whole cache lines, so that cores share none.
    return -(-(floats + worker.x_size(k, fmt, max_rows, machine)) // 16) * 16


def scratch_floats(k: int, fmt: Format, max_rows: int, machine: Machine) -> int:
    """Size of the scratch operand, in floats, for groups of at most `max_rows` rows."""
    return machine.cores * core_floats(k, fmt, max_rows, machine)


def build_product(name: str, variant: Variant, constants: Mapping[str, int], machine: Machine) -> Kernel:
    """The kernel `name`: the variant's driver with some of its scalars fixed; the others stay parameters."""
    driver = build_driver(variant, machine)
    kernel = Kernel(name, tvm.ir.GlobalVar(name), helpers=[driver])
    free: list[Param] = [(s, "int32") for s in variant.scalars if s not in constants]
    with kernel_body(kernel, [*variant.buffers, *free]) as args:
        pointers = [T.address_of(a[0]) for a in args[: len(variant.buffers)]]
        given = dict(zip([p[0] for p in free], args[len(variant.buffers) :], strict=True))
        call(driver, *pointers, *[const(constants[s]) if s in constants else given[s] for s in variant.scalars])
    return kernel


@cache
def build_driver(variant: Variant, machine: Machine) -> Kernel:
    """The driver of a variant, parallel over cores when there is enough to do."""
    names = [p[0] for p in variant.params]

    def small(values: list[Any]) -> Any:
        args = dict(zip(names, values, strict=True))
        rows = args["tokens"] * args["groups"] if variant.rows == "even" else args["offsets"][args["groups"]]
        return T.Cast("int64", rows) * args["n"] * args["k"] <= const(SERIAL_PRODUCTS, "int64")

    return parallel_kernel(
        variant.name, variant.params, _worker(variant.fmt, machine)(variant, machine).build(), machine, small
    )
