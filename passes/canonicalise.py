"""canonicalise: common subexpressions, dead code, unused functions and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Module
from moec.ir.issue import entries
from moec.ir.rewrite import fresh_names, merge_equal, remove_dead, remove_unused
from moec.passes.base import Context, Outcome, Pass


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Remove what nothing needs.

    Consumes any module; produces one without equal pure ops, dead ops, unreached functions and unused weights, values
    numbered in order. Must not change results: tolerance 0.
    """

    name: ClassVar[str] = "canonicalise"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for function in module.functions.values():
            merged, dead = merge_equal(function), remove_dead(function)
            fresh_names(function)
            out.matched += merged + dead
            if merged or dead:
                out.notes.append(f"@{function.name}: {merged} equal ops merged, {dead} dead ops removed")
        unused = remove_unused(module, [entry.name for entry in entries(module)])
        if unused:
            out.matched += unused
            out.notes.append(f"{unused} unused functions and weights removed")
        return out
