"""bind-limits: cut position tables to the context that the artifact is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Module
from moec.ir.rewrite import retype
from moec.passes.base import Context, Outcome, Pass, PassError


@dataclass(frozen=True)
class BindLimits(Pass):
    """Make rotary tables as long as the compiled context.

    Consumes tables for all positions of the model; produces tables of `limits.context` rows. Refuses a context beyond
    the model's own. Must not change results at positions within the limit: tolerance 0.
    """

    name: ClassVar[str] = "bind-limits"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for weight in module.weights.values():
            for op in weight.program.ops:
                if op.name not in ("weight.rope_table", "weight.temperature_table"):
                    continue
                known = op.attrs["positions"]
                assert isinstance(known, int)
                if ctx.limits.context > known:
                    limit = f"context {ctx.limits.context} exceeds the model's {known} positions"
                    message = f"{limit}; pass --context {known} or less"
                    raise PassError(name=self.name, message=message)
                op.attrs["positions"] = ctx.limits.context
                out.matched += 1
                out.notes.append(f"@{weight.name}: {known} -> {ctx.limits.context} positions")
        if not out.matched:
            out.warnings.append("no rotary table to cut: no weight is a table by positions")
        retype(module)
        return out
