"""Parts and other shapes of a tensor, which move nothing, and chosen rows, which do."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from moec.ir.dims import Size
from moec.ir.module import Module
from moec.ir.optable import INTS, Attrs, OpDef, TypeRuleError, require, tensor
from moec.ir.types import TensorType, Type


class Split(OpDef):
    """Views of consecutive parts of the last dim, of the given sizes."""

    name = "split"
    operands = "x"
    attrs = {"sizes": INTS}
    results = "parts*"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        sizes = a["sizes"]
        assert isinstance(sizes, tuple)
        require(sum(map(int, sizes)) == x.shape[-1], f"sizes {list(sizes)} do not sum to {x.shape[-1]}")
        return [TensorType(x.dtype, (*x.shape[:-1], int(s)), x.quant) for s in sizes]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return list(x[0].split(list(a["sizes"]), -1))

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return 0

    bytes_written = bytes_read


class Unflatten(OpDef):
    """View of the last dim as several: `[T, h·d] -> [T, h, d]`."""

    name = "unflatten"
    operands = "x"
    attrs = {"sizes": INTS}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        sizes = a["sizes"]
        assert isinstance(sizes, tuple)
        if prod(sizes) != x.shape[-1]:
            raise TypeRuleError(f"sizes {list(sizes)} do not multiply to {x.shape[-1]}")
        return [TensorType(x.dtype, (*x.shape[:-1], *sizes), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0].unflatten(-1, a["sizes"])]

    bytes_read = Split.bytes_read
    bytes_written = Split.bytes_read


class Flatten(OpDef):
    """View of all dims behind the first as one: `[T, h, d] -> [T, h·d]`."""

    name = "flatten"
    operands = "x"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x = tensor(t[0], "x")
        require(len(x.shape) >= 2, f"x must have at least 2 dims, got {x}")
        width: Size = prod(x.shape[1:], start=1)
        return [TensorType(x.dtype, (x.shape[0], width), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0].flatten(1)]

    bytes_read = Split.bytes_read
    bytes_written = Split.bytes_read


class RowsGather(OpDef):
    """Chosen rows: `y[r] = x[rows[r]]`."""

    name = "rows.gather"
    operands = "x rows"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        x, rows = tensor(t[0], "x"), tensor(t[1], "rows", 1, ("i32",))
        return [TensorType(x.dtype, (rows.shape[0], *x.shape[1:]), x.quant)]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0][x[1].long()]]

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        return tensor(r[0], "y").nbytes() + tensor(t[1], "rows").nbytes()
