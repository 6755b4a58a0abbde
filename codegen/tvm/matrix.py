"""The driver shared by every matrix kernel: work division over cores and the choice of variant by row count.

A problem is a set of groups (one for a linear layer, one per expert or head); group g multiplies its rows of x by its
packed weight. All cores walk the groups and take their share of the weight panels, so that each weight byte is read
by one core. Groups with up to `Blocking.skinny` rows go through `row_lane`; larger ones through unpacked panels and
`panel_product`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.blocking import PAD, Blocking, blocking
from moec.codegen.tvm.decode import decoder
from moec.codegen.tvm.formats import ROWS, Format
from moec.codegen.tvm.gemm import copy_row, panel_product, unpack_tile
from moec.codegen.tvm.gemv import row_lane
from moec.codegen.tvm.tir import (
    Kernel,
    Machine,
    Param,
    assign,
    call,
    const,
    kernel_body,
    parallel_kernel,
    splat,
    variables,
)

UNBOUNDED = (1 << 40,)
SERIAL_PRODUCTS = 1 << 16  # below this many multiplications a second core costs more than it saves


@dataclass(frozen=True)
class Rows:
    """Where group g finds its rows: `count(g)`, and element offsets of row i in x and in y (int64)."""

    count: Callable[[Any], Any]
    x_at: Callable[[Any, Any], Any]
    y_at: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Problem:
    """A grouped product y[row, :n] = x[row, :k] . W[g]^T (+ bias) (+ y), rows of g given by `rows(args)`.

    The kernel's parameters are x, `index` (the operands that `rows` reads), w, scale (scaled formats only), bias (if
    any), y, scratch, `scalars`.
    """

    name: str
    groups: int
    n: int
    k: int
    fmt: Format
    max_rows: int  # of one group
    index: tuple[tuple[str, tuple[int, ...]], ...]  # int32 buffers
    scalars: tuple[str, ...]
    rows: Callable[[dict[str, Any]], Rows]
    total_rows: Callable[[dict[str, Any]], Any]
    bias: bool = False
    accumulate: bool = False

    def params(self) -> list[Param]:
        """The kernel's parameters, in order."""
        names = ["w", *(["scale"] if self.fmt.scale_block else []), *(["bias"] if self.bias else []), "y", "scratch"]
        floats: list[Param] = [(n, "int32" if n == "w" else "float32", UNBOUNDED) for n in names]
        return [
            ("x", "float32", UNBOUNDED),
            *[(n, "int32", shape) for n, shape in self.index],
            *floats,
            *[(s, "int32") for s in self.scalars],
        ]


@dataclass(frozen=True)
class Scratch:
    """One core's part of the scratch memory, in floats: rows of x, a weight panel, results."""

    x: int
    panel: int
    results: int

    @property
    def floats(self) -> int:
        """Size, rounded to a cache line so that cores share none."""
        return -(-(self.x + self.panel + self.results) // 16) * 16


def _scratch(k: int, fmt: Format, max_rows: int, machine: Machine) -> Scratch:
    sizes = blocking(machine)
    skinny = min(max_rows, sizes.skinny)
    x, panel, results = skinny * (fmt.padded_k(k) + PAD), 0, skinny * ROWS
    if max_rows > sizes.skinny:
        rows = min(max_rows, sizes.mc)
        x = max(x, rows * (sizes.kc + PAD))
        panel = sizes.kc * sizes.columns
        results = max(results, sizes.results)
    return Scratch(x, panel, results)


def scratch_floats(k: int, fmt: Format, max_rows: int, machine: Machine) -> int:
    """Size of the scratch operand, in floats, for groups of at most `max_rows` rows."""
    return machine.cores * _scratch(k, fmt, max_rows, machine).floats


def build_problem(problem: Problem, machine: Machine) -> Kernel:
    """The kernel of a problem."""
    worker = _Worker(problem, machine).build()
    threshold = SERIAL_PRODUCTS // (problem.n * problem.k)
    params = problem.params()
    names = [p[0] for p in params]
    return parallel_kernel(
        problem.name,
        params,
        worker,
        machine,
        lambda args: problem.total_rows(dict(zip(names, args, strict=True))) <= threshold,
    )


class _Worker:
    """Emits the function that one core runs: its share of the panels of every group."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        self.problem, self.machine = problem, machine
        self.fmt = problem.fmt
        self.sizes: Blocking = blocking(machine)
        self.layout = _scratch(problem.k, problem.fmt, problem.max_rows, machine)
        self.tiles = -(-problem.n // ROWS)
        self.panels = -(-problem.n // self.sizes.columns)
        self.lane_groups = problem.fmt.padded_k(problem.k) // problem.fmt.per_lane
        self.helpers: dict[str, Kernel] = {}
        self.args: dict[str, Any] = {}

    def build(self) -> Kernel:
        """The worker kernel: the problem's parameters, then part and parts."""
        name = f"{self.problem.name}_part"
        kernel = Kernel(name, tvm.ir.GlobalVar(name))
        params = [*self.problem.params(), ("part", "int32"), ("parts", "int32")]
        with kernel_body(kernel, params) as args:
            self.args = dict(zip([p[0] for p in params], args, strict=True))
            self.rows = self.problem.rows(self.args)
            self.base = T.Bind(self.args["part"] * self.layout.floats)
            self._groups()
        kernel.helpers = list(self.helpers.values())
        return kernel

    def _call(self, helper: Kernel, *args: Any) -> None:
        self.helpers[helper.name] = helper
        call(helper, *args)

    def _groups(self) -> None:
        """Walk the groups; this core's share of the summed cost falls on some panels of each."""
        part, parts = (T.Cast("int64", self.args[p]) for p in ("part", "parts"))
        (passed,) = variables(1, "int64")
        assign(passed, const(0, "int64"))
        with T.serial(0, self.problem.groups) as g:
            assign(passed, passed[0] + self._panel_cost(g) * self.panels)
        total = T.Bind(passed[0])
        low, high = T.Bind(part * total // parts), T.Bind((part + 1) * total // parts)
        assign(passed, const(0, "int64"))
        with T.serial(0, self.problem.groups) as g:
            cost = T.Bind(self._panel_cost(g))

            def panel(limit: Any, cost: Any = cost) -> Any:
                inside = T.min(T.max(limit - passed[0], const(0, "int64")), cost * self.panels)
                return T.Bind(T.Cast("int32", (inside + cost - 1) // T.max(cost, const(1, "int64"))))

            first, last = panel(low), panel(high)
            assign(passed, passed[0] + cost * self.panels)
            with T.If(first < last), T.Then():
                self._group(g, T.Bind(self.rows.count(g)), first, last)

    def _panel_cost(self, g: Any) -> Any:
        """Relative time of one panel: reading it costs as much as about two rows of arithmetic."""
        count = T.Cast("int64", self.rows.count(g))
        return T.Select(count > 0, count + 2, const(0, "int64"))

    def _group(self, g: Any, count: Any, first: Any, last: Any) -> None:
        if self.problem.max_rows <= self.sizes.skinny:
            self._skinny(g, count, first, last)
            return
        with T.If(count <= self.sizes.skinny):
            with T.Then():
                self._skinny(g, count, first, last)
            with T.Else():
                self._blocked(g, count, first, last)

    def _x(self, offset: Any) -> Any:
        return T.address_of(self.args["scratch"][self.base + offset])

    def _panel(self, offset: Any) -> Any:
        return self._x(self.layout.x + offset)

    def _result(self, offset: Any) -> Any:
        return self._x(self.layout.x + self.layout.panel + offset)

    def _weight(self, g: Any, tile: Any, k: Any) -> list[Any]:
        """Pointers to a packed tile of group g and its scales, from k on."""
        index = T.Bind(T.Cast("int64", g) * self.tiles + T.Cast("int64", tile))
        lane = (index * self.lane_groups + T.Cast("int64", k // self.fmt.per_lane)) * ROWS
        pointers = [T.address_of(self.args["w"][lane])]
        if self.fmt.scale_block:
            blocks = self.fmt.padded_k(self.problem.k) // self.fmt.scale_block
            at = index * blocks + T.Cast("int64", k // self.fmt.scale_block)
            pointers.append(T.address_of(self.args["scale"][at]))
        return pointers

    def _skinny(self, g: Any, count: Any, first: Any, last: Any) -> None:
        padded = self.fmt.padded_k(self.problem.k)
        ldx = padded + PAD
        pre = const(decoder(self.fmt).pre, "float32")
        with T.serial(0, count) as r:
            source = T.address_of(self.args["x"][self.rows.x_at(g, r)])
            self._call(copy_row(self.machine), source, self._x(r * ldx), const(self.problem.k), const(padded), pre)
        chunks = T.Bind((count + self.sizes.chunk - 1) // self.sizes.chunk)
        per_panel = self.sizes.tiles
        start = T.Bind(first * per_panel)
        stop = T.Bind(T.min(last * per_panel, self.tiles))
        with T.serial(0, stop - start) as i:
            tile = T.Bind(start + i)
            with T.serial(0, chunks) as c:
                row = T.Bind(c * count // chunks)
                height = T.Bind((c + 1) * count // chunks - row)
                for m in range(1, min(self.problem.max_rows, self.sizes.chunk) + 1):
                    with T.If(height == m), T.Then():
                        kernel = row_lane(self.fmt, m, self.machine)
                        operands = [*self._weight(g, tile, const(0)), self._x(row * ldx), self._result(row * ROWS)]
                        self._call(kernel, *operands, const(ldx), const(padded))
            self._finish(const(0), g, const(0), count, tile * ROWS, ROWS)

    def _blocked(self, g: Any, count: Any, first: Any, last: Any) -> None:
        sizes, k = self.sizes, self.problem.k
        blocks = T.Bind((count + sizes.mc - 1) // sizes.mc)
        with T.serial(0, blocks) as b:
            row0 = T.Bind(b * count // blocks)
            rows = T.Bind((b + 1) * count // blocks - row0)
            c_panel = T.Bind(rows * sizes.columns)
            stride = T.Bind(const(self.layout.results) // c_panel)
            with T.serial(0, (last - first + stride - 1) // stride) as pb:
                panel0 = T.Bind(first + pb * stride)
                panels = T.Bind(T.min(last - panel0, stride))
                self._clear(panels * c_panel)
                with T.serial(0, -(-k // sizes.kc)) as kb:
                    k0 = T.Bind(kb * sizes.kc)
                    length = T.Bind(T.min(k - k0, sizes.kc))
                    with T.serial(0, rows) as r:
                        source = T.address_of(self.args["x"][self.rows.x_at(g, row0 + r) + T.Cast("int64", k0)])
                        target = self._x(r * (sizes.kc + PAD))
                        self._call(copy_row(self.machine), source, target, length, length, const(1.0, "float32"))
                    with T.serial(0, panels) as p:
                        panel = self._unpacked(g, panel0 + p, k0, length)
                        product = panel_product(self.machine)
                        self._call(product, panel, self._x(const(0)), self._result(p * c_panel), rows, length)
                with T.serial(0, panels) as p:
                    self._finish(p * c_panel, g, row0, rows, (panel0 + p) * sizes.columns, sizes.columns)

    def _clear(self, floats: Any) -> None:
        lanes = self.machine.lanes
        offset = self.layout.x + self.layout.panel
        with T.serial(0, floats // lanes) as i:
            at = T.ramp(self.base + offset + i * lanes, 1, lanes)
            T.buffer_store(self.args["scratch"], splat(0.0, lanes), [at])

    def _unpacked(self, g: Any, panel: Any, k0: Any, length: Any) -> Any:
        """Pointer to the fp32 panel [length, columns]; float32 tiles are panels already."""
        if self.fmt.name == "f32" and self.sizes.tiles == 1:
            return self._weight(g, panel, k0)[0]
        multiple = self.fmt.k_multiple
        padded = T.Bind((length + multiple - 1) // multiple * multiple)
        for i in range(self.sizes.tiles):
            # A panel past the last tile repeats it; those columns are not stored.
            tile = T.Bind(T.min(panel * self.sizes.tiles + i, self.tiles - 1))
            self._call(
                unpack_tile(self.fmt, self.machine), *self._weight(g, tile, k0), self._panel(const(i * ROWS)), padded
            )
        return self._panel(const(0))

    def _finish(self, c: Any, g: Any, row0: Any, rows: Any, column: Any, width: int) -> None:
        """y[rows, column : column + width] = results * post (+ bias) (+ y), cut off at n."""
        lanes, n = self.machine.lanes, self.problem.n
        y, scratch = self.args["y"], self.args["scratch"]
        results = T.Bind(self.base + self.layout.x + self.layout.panel + c)
        post = decoder(self.fmt).post

        def store(at: Any, source: Any, column: Any, size: int) -> None:
            index = T.ramp(at, 1, size) if size > 1 else at
            value = scratch[T.ramp(source, 1, size) if size > 1 else source]
            value = value * (splat(post, size) if size > 1 else const(post, "float32"))
            if self.problem.bias:
                value = value + self.args["bias"][T.ramp(column, 1, size) if size > 1 else column]
            if self.problem.accumulate:
                value = value + y[index]
            T.buffer_store(y, value, [index])

        with T.serial(0, rows) as r:
            at = T.Bind(self.rows.y_at(g, row0 + r) + T.Cast("int64", column))
            source = T.Bind(results + r * width)

            def vectors() -> None:
                for h in range(width // lanes):
                    store(at + h * lanes, source + h * lanes, column + h * lanes, lanes)

            if n % width == 0:
                vectors()
            else:
                with T.If(column + width <= n):
                    with T.Then():
                        vectors()
                    with T.Else(), T.serial(0, n - column) as j:
                        store(at + T.Cast("int64", j), source + j, column + j, 1)
