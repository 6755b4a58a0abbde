"""Linear layer over packed weights: y[t, :n] = x[t, :k] . W^T (+ bias) (+ y).

    kernel(x, w, [scale], [bias], y, scratch, tokens)

x f32[tokens, ldx] and y f32[tokens, ldy] may be slices of wider rows (pass the address of the first element); w is
one packed matrix (`formats.pack`), scale its scales (scaled formats only), bias f32[n] if `spec.bias`; scratch f32 of
`scratch_size(spec, machine)` elements, free to share between kernels; 0 < tokens <= spec.max_tokens. y must not
overlap x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moec.codegen.tvm.matrix import build_product, core_floats, scratch_floats
from moec.codegen.tvm.tir import Kernel, Machine
from moec.codegen.tvm.variant import Variant, reach
from moec.ir.lane16 import Format


@dataclass(frozen=True)
class LinearSpec:
    """Static parameters of a linear kernel; row strides in elements."""

    n: int
    k: int
    fmt: Format
    ldx: int
    ldy: int
    max_tokens: int
    bias: bool = False
    accumulate: bool = False

    @property
    def name(self) -> str:
        """Readable and unique: equal specs share one kernel."""
        options = ("_bias" if self.bias else "") + ("_acc" if self.accumulate else "")
        return f"linear_{self.fmt.name}_{self.n}x{self.k}_ldx{self.ldx}_ldy{self.ldy}_t{self.max_tokens}{options}"


def scratch_size(spec: LinearSpec, machine: Machine) -> int:
    """Elements (f32) of the scratch operand."""
    return scratch_floats(spec.k, spec.fmt, spec.max_tokens, machine)


@cache
def build(spec: LinearSpec, machine: Machine) -> Kernel:
    """The kernel of `spec` for `machine`."""
    variant = Variant(spec.fmt, "even", reach(spec.max_tokens, machine), spec.bias, spec.accumulate)
    constants = {"groups": 1, "n": spec.n, "k": spec.k, "ldx": spec.ldx, "hx": 0, "ldy": spec.ldy, "hy": 0}
    constants["core_floats"] = core_floats(spec.k, spec.fmt, spec.max_tokens, machine)
    return build_product(spec.name, variant, constants, machine)
