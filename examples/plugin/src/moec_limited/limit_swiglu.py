"""limit-swiglu: bound the inputs of every SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Module
from moec.ir.rewrite import fresh_names, replace_values
from moec.passes.base import Context, Edit, Outcome, Pass, PassError


@dataclass(frozen=True)
class LimitSwiglu(Pass):
    """Replace `swiglu` by `swiglu.limited`.

    Consumes `swiglu`; produces `swiglu.limited` of the same input. Results change where an input exceeds `limit`.
    """

    name: ClassVar[str] = "limit-swiglu"
    tolerance: ClassVar[float] = 0.2
    limit: float = 7.0

    def run(self, module: Module, ctx: Context) -> Outcome:
        if self.limit <= 0:
            raise PassError(name=self.name, message=f"limit must be positive, got {self.limit}")
        out = Outcome()
        for function in module.functions.values():
            edit = Edit(module, function, self.name)
            for op in [o for o in function.ops if o.name == "swiglu"]:
                (limited,) = edit.insert(op, "swiglu.limited", *op.operands, attrs={"limit": self.limit})
                replace_values(function, {op.result: limited})
                function.ops.remove(op)
                out.matched += 1
            fresh_names(function)
        if out.matched:
            out.notes.append(f"{out.matched} activations limited to {self.limit:g}; routed experts keep theirs")
        else:
            out.warnings.append("no swiglu: nothing to limit")
        return out
