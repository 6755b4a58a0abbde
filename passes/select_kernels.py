"""select-kernels: store every weight as the kernel reads it that will read it."""

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
    """Store weights as the target's kernels read them.

    Consumes weights in row-major order. For a CPU it produces `layout(lane16)` for every matrix of a product. For a GPU
    matrices stay as they are, and the gate is stored in BF16, the type in which checkpoints hold it: tensor cores form
    its products exactly and sum them in FP32. The values that the weights stand for do not change (a gate that the
    checkpoint holds in FP32 is rounded, which is said): tolerance 0.
    """

    name: ClassVar[str] = "select-kernels"

    def requires(self, module: Module) -> str:
        if any(isinstance(w.type, TensorType) and w.type.layout for w in module.weights.values()):
            return "weights are packed already"
        return ""

    def run(self, module: Module, ctx: Context) -> Outcome:
        if ctx.target.kind != "cpu":
            return self._for_gpu(module)
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

    def _for_gpu(self, module: Module) -> Outcome:
        out = Outcome()
        for _, op in module.ops():
            if op.name != "moe.route" or not isinstance(op.operands[1], WeightRef):
                continue
            x, gate = op.operands[0].type, module.weights[op.operands[1].name]
            assert isinstance(x, TensorType) and isinstance(gate.type, TensorType)
            if x.dtype == gate.type.dtype or x.dtype != "bf16":
                continue
            append_to_program(gate, "weight.cast", dtype=x.dtype)
            out.matched += 1
            loaded = {str(o.attrs["dtype"]) for o in gate.program.ops if o.name == "weight.load"}
            exact = "as the checkpoint holds it" if loaded == {x.dtype} else f"rounded from {', '.join(sorted(loaded))}"
            out.notes.append(f"@{gate.name}: stored in {x.dtype}, {exact}")
        retype(module)
        return out
