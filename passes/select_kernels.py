"""select-kernels: store every matrix in the layout of the kernel that will read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Module, TensorType, WeightRef
from moec.ir.rewrite import append_to_program, retype
from moec.passes.base import Context, Outcome, Pass

PACKED = {"linear": (1,), "linear.heads": (1,), "moe.route": (1,), "moe.experts": (2, 3)}
"""Operands that the CPU's matrix kernels read in the row-lane layout."""


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Pack matrices for the CPU's kernels.

    Consumes weights in row-major order; produces `layout(lane16)` for every matrix of a product. The values that the
    weights stand for do not change: tolerance 0.
    """

    name: ClassVar[str] = "select-kernels"

    def requires(self, module: Module) -> str:
        if any(isinstance(w.type, TensorType) and w.type.layout for w in module.weights.values()):
            return "weights are packed already"
        return ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for _, op in module.ops():
            for position in PACKED.get(op.name, ()):
                ref = op.operands[position]
                if not isinstance(ref, WeightRef):
                    out.warnings.append(f"{op.name} reads a matrix that is no weight: it stays as it is")
                    continue
                weight = module.weights[ref.name]
                assert isinstance(weight.type, TensorType)
                if weight.type.layout is None:
                    append_to_program(weight, "weight.pack", layout="lane16")
                    out.matched += 1
        if not out.matched and not out.warnings:
            out.warnings.append("no product with a weight: nothing to pack")
        retype(module)
        out.notes.append(f"{out.matched} weights packed as lane16")
        return out
