"""The kernel of a row-wise group."""

from __future__ import annotations

from collections.abc import Mapping

from moec.codegen.triton.fused import row_heads, row_ops
from moec.codegen.triton.fused.binding import Generated
from moec.codegen.triton.fused.groups import Group
from moec.codegen.triton.fused.row_writer import RowWriter
from moec.ir import Function, Value

OPS = {**row_ops.OPS, **row_heads.OPS}
"""What every row-wise op writes."""


def rows_kernel(group: Group, function: Function, name: str, in_place: Mapping[Value, Value]) -> Generated:
    """The kernel of a row-wise group; `in_place` says which result of a rotation lies where its operand does.

    Raises NoKernel for what no row can be computed by alone.
    """
    return RowWriter(group, function, name, in_place).write(OPS)
