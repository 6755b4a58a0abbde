"""Passes after which values have several readers, one of which would like to change them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from moec.ir import Module, Value
from moec.ir.rewrite import fresh_names
from moec.passes.base import Context, Edit, Outcome, Pass


@dataclass(frozen=True)
class RotateParts(Pass):
    """Rotates the key parts of queries on their own, beside the whole queries: heads that lie apart, read twice."""

    name: ClassVar[str] = "rotate-parts"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for function in [f for f in module.functions.values() if f.attrs.get("phase") == "decode"]:
            for attention in [op for op in function.ops if op.name == "attn.mla_absorbed"]:
                split = function.producer()[cast(Value, attention.operands[1])]
                whole = function.producer()[cast(Value, split.operands[0])]
                edit = Edit(module, function, self.name)
                _, key = edit.insert(whole, "split", whole.operands[0], attrs=split.attrs)
                attrs = {**whole.attrs, "offset": 0}
                (attention.operands[1],) = edit.insert(whole, "rope", key, *whole.operands[1:], attrs=attrs)
                fresh_names(function)
                out.matched += 1
        return out


@dataclass(frozen=True)
class AddUnrotated(Pass):
    """Adds half of the unrotated keys to the rotated ones, read from the whole that they are a part of."""

    name: ClassVar[str] = "add-unrotated"

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        for function in module.functions.values():
            for append in [op for op in function.ops if op.name == "cache.append"]:
                rotated = cast(Value, append.operands[3])
                split = function.producer()[cast(Value, function.producer()[rotated].operands[0])]
                edit = Edit(module, function, self.name)
                (half,) = edit.insert(append, "scale", split.operands[0], attrs={"factor": 0.5})
                _, key = edit.insert(append, "split", half, attrs=split.attrs)
                (append.operands[3],) = edit.insert(append, "add", rotated, key)
                fresh_names(function)
                out.matched += 1
        return out
