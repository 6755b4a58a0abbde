"""One core's share of a matrix product by matrix tiles: for weights that are exact in BF16, see `amx`."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm import amx, tiles
from moec.codegen.tvm.blocking import PAD, TileBlocking, blocking, tile_blocking
from moec.codegen.tvm.gemv import BATCH, STREAMS
from moec.codegen.tvm.tir import Machine, const
from moec.codegen.tvm.worker import Worker
from moec.ir.lane16 import ROWS, Format

_COLUMNS = 2 * ROWS


class TileWorker(Worker):
    """Groups of one chunk go row by row through vectors, at the speed of memory; groups with up to `tiles.FEW` rows
    pass their weights once, from memory through one or two tiles; larger ones in panels.

    Rows of x are split into BF16 pairs once per block of x.
    """

    @staticmethod
    def panel_size(limit: int, machine: Machine) -> int:
        if limit:
            return Worker.panel_size(limit, machine)
        return max(tiles.FEW_FLOATS, tile_blocking(machine).kc * ROWS + tiles.PAIR_FLOATS)

    @staticmethod
    def result_size(limit: int, machine: Machine) -> int:
        few = max(BATCH * (limit or blocking(machine).chunk), STREAMS * tiles.FEW) * ROWS
        return few if limit else max(tile_blocking(machine).results, few)

    @staticmethod
    def x_size(k: int, fmt: Format, max_rows: int, machine: Machine) -> int:
        sizes, chunk = tile_blocking(machine), min(max_rows, blocking(machine).chunk)
        few = max(tiles.few_floats(min(max_rows, tiles.FEW), fmt.padded_k(k)), chunk * (fmt.padded_k(k) + PAD))
        width = min(fmt.padded_k(k), sizes.kx)
        rows = -(-min(max_rows, sizes.rows(max(width, tiles.BLOCK))) // 16) * 16
        return max(few, rows * width) if max_rows > tiles.FEW else few

    @property
    def blocks(self) -> TileBlocking:
        """Block sizes."""
        return tile_blocking(self.machine)

    def _panel_cost(self, g: Any) -> Any:
        """Relative time of one panel: widening its weights takes as long as the products of about 32 rows."""
        count = T.Cast("int64", self._count(g))
        return T.Select(count > 0, count + 32, const(0, "int64"))

    def _more_rows(self, g: Any, count: Any, first: Any, last: Any) -> None:
        with T.If(count <= tiles.FEW):
            with T.Then(), T.If(count <= tiles.NARROW):
                with T.Then():
                    self._few(g, count, first, last, wide=False)
                with T.Else():
                    self._few(g, count, first, last, wide=True)
            with T.Else():
                self._many(g, count, first, last)

    @property
    def _half(self) -> float:
        """Factor of x, and of results: together they undo the shift of the weights' exponents."""
        return float(amx.post_scale(self.fmt) ** 0.5)

    def _few(self, g: Any, count: Any, first: Any, last: Any, wide: bool) -> None:
        """Every weight tile with all rows at once; `wide`: their two parts in tiles of their own."""
        amx.configure(count if wide else count * 2)
        step = T.Bind(count * (2 * ROWS))
        with T.serial(0, count) as r:
            source = T.address_of(self.args["x"][self._at(g, r, "x")])
            high, low = self._x(r * ROWS), self._x((count + r) * ROWS)
            split = amx.split_row(self.fmt, self.machine)
            self._call(split, source, high, low, self.args["k"], self.padded, step, const(self._half, "float32"))
        start = T.Bind(first * 2)
        stop = T.Bind(T.min(last * 2, self.tiles))
        product = tiles.few_rows(self.fmt, wide, self.machine)
        with T.serial(0, (stop - start + STREAMS - 1) // STREAMS) as group:
            tile = T.Bind(start + group * STREAMS)
            together = T.Bind(T.min(stop - tile, STREAMS))
            operands = [*self._weight(g, tile, const(0)), self._x(const(0)), self._result(const(0))]
            self._call(product, *operands, self._panel(const(0)), together, count, self.padded)
            with T.serial(0, together) as i:
                self._finish(i * count * ROWS, g, const(0), count, (tile + i) * ROWS, ROWS, self._half)
        amx.release()

    def _many(self, g: Any, count: Any, first: Any, last: Any) -> None:
        """Blocks of x rows; for each, groups of panels whose results fit their memory; for these, blocks of k."""
        sizes, half = self.blocks, const(self._half, "float32")
        amx.configure(const(16))
        most = T.Bind(sizes.rows(T.max(T.min(self.padded, sizes.kx), tiles.BLOCK)))
        blocks = T.Bind((count + most - 1) // most)
        parts = T.Bind((self.padded + sizes.kx - 1) // sizes.kx)
        with T.serial(0, blocks) as b:
            row0 = T.Bind(b * count // blocks)
            rows = T.Bind((b + 1) * count // blocks - row0)
            row_tiles = T.Bind((rows + 15) // 16)
            one_panel = T.Bind(row_tiles * (16 * _COLUMNS))
            # With one block of k a panel is done before the next begins, and their results share their place.
            kept = T.Bind(T.Select(parts == 1, const(0), one_panel))
            fitting = T.Bind(T.Select(parts == 1, last - first, const(self.result_floats) // one_panel))
            with T.serial(0, (last - first + fitting - 1) // fitting) as pb:
                panel0 = T.Bind(first + pb * fitting)
                panels = T.Bind(T.min(last - panel0, fitting))
                with T.serial(0, parts) as kb:
                    k0 = T.Bind(kb * sizes.kx)
                    length = T.Bind(T.min(self.padded - k0, sizes.kx))
                    self._split_rows(g, row0, rows, k0, length, half)
                    with T.serial(0, panels) as p:
                        result = T.Bind(p * kept)
                        with T.If(kb == 0), T.Then():
                            self._clear(result, one_panel)
                        self._panel_product(g, panel0 + p, result, row_tiles, k0, length)
                        with T.If(kb == parts - 1), T.Then():
                            column = (panel0 + p) * _COLUMNS
                            self._finish(result, g, row0, rows, column, _COLUMNS, self._half)
        amx.release()

    def _split_rows(self, g: Any, row0: Any, rows: Any, k0: Any, length: Any, half: Any) -> None:
        per_tile = T.Bind(length // amx.STEP * (2 * amx.TILE))
        given = T.Bind(T.max(T.min(self.args["k"] - k0, length), 0))
        with T.serial(0, rows) as r:
            source = T.address_of(self.args["x"][self._at(g, row0 + r, "x") + T.Cast("int64", k0)])
            at = T.Bind(r // 16 * per_tile + r % 16 * amx.LANES)
            split = amx.split_row(self.fmt, self.machine)
            self._call(split, source, self._x(at), self._x(at + amx.TILE), given, length, const(2 * amx.TILE), half)

    def _panel_product(self, g: Any, panel: Any, result: Any, row_tiles: Any, k0: Any, length: Any) -> None:
        """result += the block of x times a panel, `kc` at a time."""
        x_stride = T.Bind(length // amx.STEP * (2 * amx.TILE))
        with T.serial(0, (length + self.blocks.kc - 1) // self.blocks.kc) as i:
            inner = T.Bind(i * self.blocks.kc)
            size = T.Bind(T.min(length - inner, self.blocks.kc))
            stride = T.Bind(size // 2 * ROWS)
            scales = []
            for side in range(2):
                # A panel past the last tile repeats it; those columns are not stored.
                tile = T.Bind(T.min(panel * 2 + side, self.tiles - 1))
                weight, *scale = self._weight(g, tile, k0 + inner)
                scales += scale
                target = self._panel(T.Bind(tiles.PAIR_FLOATS + side * stride))
                self._call(tiles.tile_weights(self.fmt, self.machine), weight, target, size)
            x = self._x(inner // amx.STEP * (2 * amx.TILE))
            # The panel's next k, or the next panel's first ones.
            over = T.Bind(T.Select(k0 + inner + size >= self.padded, self.padded, const(0)))
            following = T.Bind(panel * 2 + T.Select(over > 0, const(2), const(0)))
            upcoming = [self._weight(g, following + side, k0 + inner + size - over)[0] for side in range(2)]
            lines = size // self.fmt.per_lane
            self._call(
                tiles.tile_panel(self.fmt, self.machine), self._panel(const(tiles.PAIR_FLOATS)), *scales, x,
                self._result(result), self._panel(const(0)), *upcoming, row_tiles, size, stride, x_stride, lines,
            )  # fmt: skip
