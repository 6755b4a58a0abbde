"""What distinguishes the drivers of matrix products: storage format, arrangement of rows, epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moec.codegen.tvm.blocking import blocking
from moec.codegen.tvm.tir import Machine, Param
from moec.ir.lane16 import Format

UNBOUNDED = (1 << 40,)


@dataclass(frozen=True)
class Variant:
    """What is compiled once for all sizes.

    `rows`: "even" groups all have the rows 0 .. tokens - 1, row i of group g at i * ldx + g * hx (y likewise); "sorted"
    groups own the rows offsets[g] .. offsets[g + 1] - 1 of x and y; of "gathered" ones row r is row_index[r] of x.
    `reach` is the most rows of a group that occur, 0 for more than a chunk.
    """

    fmt: Format
    rows: Literal["even", "sorted", "gathered"]
    reach: int
    bias: bool = False
    accumulate: bool = False

    @property
    def name(self) -> str:
        """Readable and unique."""
        options = ("_bias" if self.bias else "") + ("_acc" if self.accumulate else "")
        return f"matrix_{self.rows}_{self.fmt.name}_m{self.reach or 'any'}{options}"

    @property
    def scalars(self) -> tuple[str, ...]:
        """Sizes, strides, and the floats of scratch memory of one core."""
        even = self.rows == "even"
        strides = ("ldx", "hx", "ldy", "hy") if even else ("ldx", "ldy")
        return (*(("tokens",) if even else ()), "groups", "n", "k", *strides, "core_floats")

    @property
    def buffers(self) -> list[Param]:
        """x, [row_index], [offsets], w, [scale], [bias], y, scratch."""
        index = {"even": (), "sorted": ("offsets",), "gathered": ("row_index", "offsets")}[self.rows]
        operands = ["w", *(["scale"] if self.fmt.scale_block else []), *(["bias"] if self.bias else [])]
        integers = {*index, "w"}
        names = ["x", *index, *operands, "y", "scratch"]
        types = dict.fromkeys(integers, "int32") | {"scale": self.fmt.scale_dtype}
        return [(n, types.get(n, "float32"), UNBOUNDED) for n in names]

    @property
    def params(self) -> list[Param]:
        """Parameters of the driver."""
        return [*self.buffers, *[(s, "int32") for s in self.scalars]]


def reach(max_rows: int, machine: Machine) -> int:
    """`Variant.reach` of groups with at most `max_rows` rows."""
    return max_rows if max_rows <= blocking(machine).chunk else 0
