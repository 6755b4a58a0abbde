"""One core's share of a matrix product, by vector instructions: the walk over groups and panels, and both paths."""

from __future__ import annotations

from typing import Any, Literal

import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import vnni
from moec.codegen.tvm.blocking import PAD, blocking
from moec.codegen.tvm.decode import decoder
from moec.codegen.tvm.gemm import copy_row, panel_product, unpack_tile
from moec.codegen.tvm.gemv import BATCH, row_lane, row_tiles
from moec.codegen.tvm.tir import Kernel, Machine, Param, assign, call, const, kernel_body, splat, variables
from moec.codegen.tvm.variant import Variant
from moec.ir.lane16 import ROWS, Format


class Worker:
    """Emits the function that one core runs: its share of the panels of every group."""

    def __init__(self, variant: Variant, machine: Machine) -> None:
        self.variant, self.machine = variant, machine
        self.fmt = variant.fmt
        self.sizes = blocking(machine)
        self.panel_floats = self.panel_size(variant.reach, machine)
        self.result_floats = self.result_size(variant.reach, machine)
        self.helpers: dict[str, Kernel] = {}
        self.args: dict[str, Any] = {}

    # Scratch memory of one core, in floats: a weight panel, results, rows of x.

    @staticmethod
    def panel_size(limit: int, machine: Machine) -> int:
        """Floats of the panel, for groups of at most `limit` rows (0: any number)."""
        return 0 if limit else blocking(machine).kc * blocking(machine).columns

    @staticmethod
    def result_size(limit: int, machine: Machine) -> int:
        """Floats of the results."""
        sizes = blocking(machine)
        few = max(BATCH * (limit or sizes.chunk), sizes.skinny) * ROWS
        return few if limit else max(sizes.results, few)

    @staticmethod
    def x_size(k: int, fmt: Format, max_rows: int, machine: Machine) -> int:
        """Floats of the rows of x."""
        sizes = blocking(machine)
        x = min(max_rows, sizes.skinny) * (fmt.padded_k(k) + PAD)
        return max(x, min(max_rows, sizes.mc) * (sizes.kc + PAD)) if max_rows > sizes.skinny else x

    def build(self) -> Kernel:
        """The worker kernel: the driver's parameters, then part and parts."""
        name = f"{self.variant.name}_part"
        kernel = Kernel(name, tvm.ir.GlobalVar(name))
        params: list[Param] = [*self.variant.params, ("part", "int32"), ("parts", "int32")]
        with kernel_body(kernel, params) as values:
            args = self.args = dict(zip([p[0] for p in params], values, strict=True))
            multiple = self.fmt.k_multiple
            self.padded = T.Bind((args["k"] + multiple - 1) // multiple * multiple)
            self.tiles = T.Bind((args["n"] + ROWS - 1) // ROWS)
            self.panels = T.Bind((args["n"] + self.sizes.columns - 1) // self.sizes.columns)
            self.base = T.Bind(T.Cast("int64", args["part"]) * args["core_floats"])
            self._groups()
        kernel.helpers = list(self.helpers.values())
        return kernel

    def _call(self, helper: Kernel, *args: Any) -> None:
        self.helpers[helper.name] = helper
        call(helper, *args)

    def _count(self, g: Any) -> Any:
        if self.variant.rows == "even":
            return self.args["tokens"]
        return self.args["offsets"][g + 1] - self.args["offsets"][g]

    def _at(self, g: Any, i: Any, operand: Literal["x", "y"]) -> Any:
        """Element offset of row i of group g, in int64."""
        stride = self.args[f"ld{operand}"]
        if self.variant.rows == "even":
            return T.Cast("int64", i) * stride + T.Cast("int64", g) * self.args[f"h{operand}"]
        row = self.args["offsets"][g] + i
        if self.variant.rows == "gathered" and operand == "x":
            row = self.args["row_index"][row]
        return T.Cast("int64", row) * stride

    def _groups(self) -> None:
        """Walk the groups; this core's share of the summed cost falls on some panels of each."""
        part, parts, panels = (T.Cast("int64", v) for v in (self.args["part"], self.args["parts"], self.panels))
        (passed,) = variables(1, "int64")
        assign(passed, const(0, "int64"))
        with T.serial(0, self.args["groups"]) as g:
            assign(passed, passed[0] + self._panel_cost(g) * panels)
        total = T.Bind(passed[0])
        low, high = T.Bind(part * total // parts), T.Bind((part + 1) * total // parts)
        assign(passed, const(0, "int64"))
        with T.serial(0, self.args["groups"]) as g:
            cost = T.Bind(self._panel_cost(g))

            def panel(limit: Any, cost: Any = cost) -> Any:
                inside = T.min(T.max(limit - passed[0], const(0, "int64")), cost * panels)
                return T.Bind(T.Cast("int32", (inside + cost - 1) // T.max(cost, const(1, "int64"))))

            first, last = panel(low), panel(high)
            assign(passed, passed[0] + cost * panels)
            with T.If(first < last), T.Then():
                self._group(g, T.Bind(self._count(g)), first, last)

    def _panel_cost(self, g: Any) -> Any:
        """Relative time of one panel: reading it costs as much as about two rows of arithmetic."""
        count = T.Cast("int64", self._count(g))
        return T.Select(count > 0, count + 2, const(0, "int64"))

    def _group(self, g: Any, count: Any, first: Any, last: Any) -> None:
        if self.variant.reach:
            self._chunk(g, count, first, last)
            return
        with T.If(count <= self.sizes.chunk):
            with T.Then():
                self._chunk(g, count, first, last)
            with T.Else():
                self._more_rows(g, count, first, last)

    def _more_rows(self, g: Any, count: Any, first: Any, last: Any) -> None:
        """More rows than one chunk holds."""
        with T.If(count <= self.sizes.skinny):
            with T.Then():
                self._skinny(g, count, first, last)
            with T.Else():
                self._blocked(g, count, first, last)

    def _panel(self, offset: Any) -> Any:
        return T.address_of(self.args["scratch"][self.base + offset])

    def _result(self, offset: Any) -> Any:
        return self._panel(self.panel_floats + offset)

    def _x(self, offset: Any) -> Any:
        return self._panel(self.panel_floats + self.result_floats + offset)

    def _weight(self, g: Any, tile: Any, k: Any) -> list[Any]:
        """Pointers to a packed tile of group g and its scales, from k on."""
        index = T.Bind(T.Cast("int64", g) * self.tiles + T.Cast("int64", tile))
        lane = index * (self.padded // self.fmt.per_lane) + T.Cast("int64", k // self.fmt.per_lane)
        pointers = [T.address_of(self.args["w"][lane * ROWS])]
        if self.fmt.scale_block:
            block = index * (self.padded // self.fmt.scale_block) + T.Cast("int64", k // self.fmt.scale_block)
            pointers.append(T.address_of(self.args["scale"][block * self.fmt.block_scales]))
        return pointers

    def _copy_rows(self, g: Any, count: Any) -> Any:
        """Rows of x to scratch memory, times `Decoder.pre`, zero beyond k; returns their stride."""
        ldx = T.Bind(self.padded + PAD)
        pre = const(decoder(self.fmt, self.machine).pre, "float32")
        with T.serial(0, count) as r:
            source = T.address_of(self.args["x"][self._at(g, r, "x")])
            self._call(copy_row(self.machine), source, self._x(r * ldx), self.args["k"], self.padded, pre)
        return ldx

    def _digit_rows(self, g: Any, count: Any) -> Any:
        """Rows of x to scratch memory as integers; returns their stride."""
        with T.serial(0, count) as r:
            source = T.address_of(self.args["x"][self._at(g, r, "x")])
            self._call(vnni.digit_row(self.machine), source, self._x(r * self.padded), self.args["k"], self.padded)
        return self.padded

    def _chunk(self, g: Any, count: Any, first: Any, last: Any) -> None:
        """Up to a chunk of rows, in batches of tiles."""
        integers = vnni.multiplies(self.fmt, self.machine)
        ldx = self._digit_rows(g, count) if integers else self._copy_rows(g, count)
        start = T.Bind(first * self.sizes.tiles)
        stop = T.Bind(T.min(last * self.sizes.tiles, self.tiles))
        with T.serial(0, (stop - start + BATCH - 1) // BATCH) as batch:
            tile = T.Bind(start + batch * BATCH)
            tiles = T.Bind(T.min(stop - tile, BATCH))
            operands = [*self._weight(g, tile, const(0)), self._x(const(0)), self._result(const(0))]
            for m in range(1, (self.variant.reach or self.sizes.chunk) + 1):
                with T.If(count == m), T.Then():
                    product = vnni.row_tiles(m, self.machine) if integers else row_tiles(self.fmt, m, self.machine)
                    self._call(product, *operands, ldx, self.padded, tiles)
            post = decoder(self.fmt, self.machine).post
            with T.serial(0, tiles) as i:
                self._finish(i * count * ROWS, g, const(0), count, (tile + i) * ROWS, ROWS, post)

    def _skinny(self, g: Any, count: Any, first: Any, last: Any) -> None:
        """Rows in even chunks; a second chunk finds the tile in cache."""
        ldx = self._copy_rows(g, count)
        chunks = T.Bind((count + self.sizes.chunk - 1) // self.sizes.chunk)
        start = T.Bind(first * self.sizes.tiles)
        stop = T.Bind(T.min(last * self.sizes.tiles, self.tiles))
        with T.serial(0, stop - start) as i:
            tile = T.Bind(start + i)
            pointers = self._weight(g, tile, const(0))
            with T.serial(0, chunks) as c:
                row = T.Bind(c * count // chunks)
                height = T.Bind((c + 1) * count // chunks - row)
                for m in range(1, self.sizes.chunk + 1):
                    with T.If(height == m), T.Then():
                        operands = [*pointers, self._x(row * ldx), self._result(row * ROWS)]
                        self._call(row_lane(self.fmt, m, self.machine), *operands, ldx, self.padded)
            self._finish(const(0), g, const(0), count, tile * ROWS, ROWS, decoder(self.fmt, self.machine).post)

    def _blocked(self, g: Any, count: Any, first: Any, last: Any) -> None:
        """Blocks of x rows in L2; for each, groups of panels whose results fit their memory; for these, blocks of k."""
        sizes, k, post = self.sizes, self.args["k"], decoder(self.fmt, self.machine).post
        blocks = T.Bind((count + sizes.mc - 1) // sizes.mc)
        with T.serial(0, blocks) as b:
            row0 = T.Bind(b * count // blocks)
            rows = T.Bind((b + 1) * count // blocks - row0)
            one_panel = T.Bind(rows * sizes.columns)
            fitting = T.Bind(const(self.result_floats) // one_panel)
            with T.serial(0, (last - first + fitting - 1) // fitting) as pb:
                panel0 = T.Bind(first + pb * fitting)
                panels = T.Bind(T.min(last - panel0, fitting))
                self._clear(const(0), panels * one_panel)
                with T.serial(0, (k + sizes.kc - 1) // sizes.kc) as kb:
                    k0 = T.Bind(kb * sizes.kc)
                    length = T.Bind(T.min(k - k0, sizes.kc))
                    with T.serial(0, rows) as r:
                        source = T.address_of(self.args["x"][self._at(g, row0 + r, "x") + T.Cast("int64", k0)])
                        target = self._x(r * (sizes.kc + PAD))
                        self._call(copy_row(self.machine), source, target, length, length, const(1.0, "float32"))
                    with T.serial(0, panels) as p:
                        panel = self._unpacked(g, panel0 + p, k0, length)
                        result = self._result(p * one_panel)
                        self._call(panel_product(self.machine), panel, self._x(const(0)), result, rows, length)
                with T.serial(0, panels) as p:
                    self._finish(p * one_panel, g, row0, rows, (panel0 + p) * sizes.columns, sizes.columns, post)

    def _clear(self, result: Any, floats: Any) -> None:
        lanes = self.machine.lanes
        with T.serial(0, floats // lanes) as i:
            at = T.ramp(self.base + self.panel_floats + result + i * lanes, 1, lanes)
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
            target = self._panel(const(i * ROWS))
            self._call(unpack_tile(self.fmt, self.machine), *self._weight(g, tile, k0), target, padded)
        return self._panel(const(0))

    def _finish(self, c: Any, g: Any, row0: Any, rows: Any, column: Any, width: int, post: float) -> None:
        """y[rows, column : column + width] = results * post (+ bias) (+ y), cut off at n."""
        lanes, n = self.machine.lanes, self.args["n"]
        y, scratch = self.args["y"], self.args["scratch"]
        results = T.Bind(self.base + self.panel_floats + c)

        def store(at: Any, source: Any, column: Any, size: int) -> None:
            def span(start: Any) -> Any:
                return T.ramp(start, 1, size) if size > 1 else start

            value = scratch[span(source)] * (splat(post, size) if size > 1 else const(post, "float32"))
            if self.variant.bias:
                value = value + self.args["bias"][span(column)]
            if self.variant.accumulate:
                value = value + y[span(at)]
            T.buffer_store(y, value, [span(at)])

        with T.serial(0, rows) as r:
            at = T.Bind(self._at(g, row0 + r, "y") + T.Cast("int64", column))
            source = T.Bind(results + r * width)
            with T.If(column + width <= n):
                with T.Then(), T.serial(0, width // lanes) as h:
                    store(at + h * lanes, source + h * lanes, column + h * lanes, lanes)
                with T.Else(), T.serial(0, n - column) as j:
                    store(at + j, source + j, column + j, 1)
