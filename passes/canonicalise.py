"""canonicalise: common subexpressions, dead code, unused functions and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Module
from moec.ir.rewrite import fresh_names, merge_equal, remove_dead, remove_unused
from moec.passes.base import Context, Outcome, Pass

ENTRIES = ("prefill", "decode")
"""Functions that the runtime calls. A module that has neither keeps what no other of its functions calls."""


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
        called = {str(op.attrs["func"]) for _, op in module.ops() if op.name == "repeat"}
        entries = [e for e in ENTRIES if e in module.functions] or [f for f in module.functions if f not in called]
        unused = remove_unused(module, entries)
        if unused:
            out.matched += unused
            out.notes.append(f"{unused} unused functions and weights removed")
        return out
