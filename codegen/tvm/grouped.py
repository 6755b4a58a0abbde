"""Grouped linear layers over stacked packed weights: routed experts, and per-head products.

Experts (`GroupedSpec`): rows sorted by group, y[r, :n] = x[source(r), :k] . W[group of r]^T

    kernel(x, [row_index], offsets, w, [scale], y, scratch)

offsets i32[groups + 1]: group g owns the rows offsets[g] .. offsets[g + 1] - 1 (run-time values, ascending from 0, at
most `max_rows` in all); with `gather`, source(r) = row_index[r] (i32[rows]), else r. w int32[groups, packed matrix],
scale f32[groups, scales]. Groups without rows are not read. `moe.sort_by_expert` makes offsets and row_index.

Heads (`HeadwiseSpec`): y[t, h, :n] = x[t, h, :k] . W[h]^T

    kernel(x, w, [scale], y, scratch, tokens)

element (t, h, i) of x stands at t * ldx + h * hx + i, of y at t * ldy + h * hy + i. Both: scratch f32 of
`scratch_size(spec, machine)` elements; y must not overlap x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import tirx as T

from moec.codegen.tvm.formats import Format
from moec.codegen.tvm.matrix import UNBOUNDED, Problem, Rows, build_problem, scratch_floats
from moec.codegen.tvm.tir import Kernel, Machine, const


@dataclass(frozen=True)
class GroupedSpec:
    """Static parameters of a grouped kernel; `max_rows` bounds all rows together and `max_group_rows` one group's.

    Without `max_group_rows` one group may own every row. top-k experts are distinct, so a group then owns at most one
    row per token: pass the token limit.
    """

    groups: int
    n: int
    k: int
    fmt: Format
    ldx: int
    ldy: int
    max_rows: int
    max_group_rows: int = 0
    gather: bool = False
    accumulate: bool = False

    @property
    def group_rows(self) -> int:
        """Most rows of one group."""
        return self.max_group_rows or self.max_rows

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        options = ("_gather" if self.gather else "") + ("_acc" if self.accumulate else "")
        shape = f"{self.groups}x{self.n}x{self.k}_ldx{self.ldx}_ldy{self.ldy}"
        return f"grouped_{self.fmt.name}_{shape}_r{self.max_rows}_g{self.group_rows}{options}"


@dataclass(frozen=True)
class HeadwiseSpec:
    """Static parameters of a per-head kernel; token strides ldx, ldy and head strides hx, hy in elements."""

    heads: int
    n: int
    k: int
    fmt: Format
    ldx: int
    hx: int
    ldy: int
    hy: int
    max_tokens: int

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        strides = f"ldx{self.ldx}_hx{self.hx}_ldy{self.ldy}_hy{self.hy}"
        return f"headwise_{self.fmt.name}_{self.heads}x{self.n}x{self.k}_{strides}_t{self.max_tokens}"


def scratch_size(spec: GroupedSpec | HeadwiseSpec, machine: Machine) -> int:
    """Elements (f32) of the scratch operand."""
    rows = spec.group_rows if isinstance(spec, GroupedSpec) else spec.max_tokens
    return scratch_floats(spec.k, spec.fmt, rows, machine)


@cache
def build_grouped(spec: GroupedSpec, machine: Machine) -> Kernel:
    """The kernel of `spec` for `machine`."""

    def rows(args: dict[str, Any]) -> Rows:
        offsets = args["offsets"]

        def source(g: Any, i: Any) -> Any:
            row = offsets[g] + i
            return args["row_index"][row] if spec.gather else row

        return Rows(
            count=lambda g: offsets[g + 1] - offsets[g],
            x_at=lambda g, i: T.Cast("int64", source(g, i)) * const(spec.ldx, "int64"),
            y_at=lambda g, i: T.Cast("int64", offsets[g] + i) * const(spec.ldy, "int64"),
        )

    index: list[tuple[str, tuple[int, ...]]] = [("row_index", UNBOUNDED)] if spec.gather else []
    problem = Problem(
        spec.name, spec.groups, spec.n, spec.k, spec.fmt, spec.group_rows, (*index, ("offsets", UNBOUNDED)), (), rows,
        total_rows=lambda args: args["offsets"][spec.groups], accumulate=spec.accumulate,
    )  # fmt: skip
    return build_problem(problem, machine)


@cache
def build_headwise(spec: HeadwiseSpec, machine: Machine) -> Kernel:
    """The kernel of `spec` for `machine`."""

    def at(i: Any, g: Any, token_stride: int, head_stride: int) -> Any:
        return T.Cast("int64", i) * const(token_stride, "int64") + T.Cast("int64", g * head_stride)

    def rows(args: dict[str, Any]) -> Rows:
        return Rows(
            count=lambda g: args["tokens"],
            x_at=lambda g, i: at(i, g, spec.ldx, spec.hx),
            y_at=lambda g, i: at(i, g, spec.ldy, spec.hy),
        )

    problem = Problem(
        spec.name, spec.heads, spec.n, spec.k, spec.fmt, spec.max_tokens, (), ("tokens",), rows,
        total_rows=lambda args: args["tokens"] * spec.heads,
    )  # fmt: skip
    return build_problem(problem, machine)
