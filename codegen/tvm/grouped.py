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
from typing import Literal

from moec.codegen.tvm.matrix import build_product, core_floats, scratch_floats
from moec.codegen.tvm.tir import Kernel, Machine
from moec.codegen.tvm.variant import Variant, reach
from moec.ir.lane16 import Format


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
    rows = spec.group_rows
    kind: Literal["gathered", "sorted"] = "gathered" if spec.gather else "sorted"
    variant = Variant(spec.fmt, kind, reach(rows, machine), accumulate=spec.accumulate)
    constants = {"groups": spec.groups, "n": spec.n, "k": spec.k, "ldx": spec.ldx, "ldy": spec.ldy}
    constants["core_floats"] = core_floats(spec.k, spec.fmt, rows, machine)
    return build_product(spec.name, variant, constants, machine)


@cache
def build_headwise(spec: HeadwiseSpec, machine: Machine) -> Kernel:
    """The kernel of `spec` for `machine`."""
    variant = Variant(spec.fmt, "even", reach(spec.max_tokens, machine))
    constants = {"groups": spec.heads, "n": spec.n, "k": spec.k}
    constants |= {"ldx": spec.ldx, "hx": spec.hx, "ldy": spec.ldy, "hy": spec.hy}
    constants["core_floats"] = core_floats(spec.k, spec.fmt, spec.max_tokens, machine)
    return build_product(spec.name, variant, constants, machine)
