"""fuse: join ops that one kernel can do in one pass over its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Function, Module, Op, TensorType, Value, Weight, WeightRef
from moec.ir.builder import weight_ref
from moec.ir.optable import TypeRuleError
from moec.ir.patterns import Pattern, matches
from moec.ir.rewrite import fresh_names, join_weights, remove_dead, replace_values
from moec.passes.base import Context, Edit, Outcome, Pass

Joined = dict[tuple[str, ...], Weight]
"""Weights made of others, by the names of their parts: functions that read the same parts share one."""
SUM_AND_NORM = Pattern("norm.rms", (Pattern("add", bind="sum"),))


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse a residual sum with the norm behind it, and projections of one input into one.

    Consumes `add` followed by `norm.rms` of its result, and `linear` ops that share x; produces `norm.add_rms`, and one
    `linear` over weights joined by rows followed by a `split`. Quantised parts keep their own scales. Results change
    by the order of a sum at most.
    """

    name: ClassVar[str] = "fuse"
    tolerance: ClassVar[float] = 1e-6

    def run(self, module: Module, ctx: Context) -> Outcome:
        out = Outcome()
        made: Joined = {}
        for function in module.functions.values():
            norms = _add_norms(module, function)
            joined = _join_linears(module, function, ctx, out, made)
            remove_dead(function)
            fresh_names(function)
            out.matched += norms + joined
            if norms or joined:
                out.notes.append(
                    f"@{function.name}: norms with their residual sum: {norms}, projections joined: {joined}"
                )
        if not out.matched:
            out.warnings.append("no residual sum before a norm and no projections of one input")
        return out


def _add_norms(module: Module, function: Function) -> int:
    """Norms take the residual sum that they read; returns how many do."""
    count = 0
    for norm, bound in matches(function, SUM_AND_NORM):
        added, edit = bound["sum"], Edit(module, function, Fuse.name)
        if added not in function.ops:
            continue
        total, normed = edit.insert(added, "norm.add_rms", *added.operands, norm.operands[1], attrs=norm.attrs)
        function.ops.remove(added)
        function.ops.remove(norm)
        replace_values(function, {added.result: total, norm.result: normed})
        fresh_names(function)
        count += 1
    return count


def _join_linears(module: Module, function: Function, ctx: Context, out: Outcome, made: Joined) -> int:
    by_input: dict[tuple[Value, object], list[Op]] = {}
    for op in function.ops:
        if op.name == "linear" and len(op.operands) == 2 and isinstance(op.operands[0], Value):
            by_input.setdefault((op.operands[0], op.attrs.get("out")), []).append(op)
    count = 0
    for (x, _), ops in by_input.items():
        refs = [op.operands[1] for op in ops]
        if len(ops) < 2 or not all(isinstance(r, WeightRef) for r in refs):
            continue
        weights = [module.weights[r.name] for r in refs if isinstance(r, WeightRef)]
        if len({w.indices for w in weights}) > 1 or len({r.indices for r in refs if isinstance(r, WeightRef)}) > 1:
            continue
        parts_of = tuple(w.name for w in weights)
        try:
            joined = made.get(parts_of) or join_weights(_joined_name(module, parts_of), weights, 0)
            if ctx.target.kind != "cpu":
                _check_blocks(joined, weights[0])
        except TypeRuleError as error:
            out.notes.append(f"@{function.name}: projections of %{x.name} stay apart: {error}")
            continue
        module.weights[joined.name] = made[parts_of] = joined
        first = refs[0]
        assert isinstance(first, WeightRef)
        edit = Edit(module, function, Fuse.name)
        (wide,) = edit.insert(ops[0], "linear", x, weight_ref(joined, first.indices), attrs=ops[0].attrs)
        sizes = tuple(int(w.type.shape[0]) for w in weights if isinstance(w.type, TensorType))  # type: ignore[arg-type]
        parts = edit.insert(ops[0], "split", wide, attrs={"sizes": sizes})
        for op in ops:
            function.ops.remove(op)
        replace_values(function, {op.result: p for op, p in zip(ops, parts, strict=True)})
        count += len(ops)
    return count


def _joined_name(module: Module, parts: Sequence[str]) -> str:
    """The first part's name with the last words of the others, or all their names where that is taken."""
    short = "_and_".join([parts[0], *(part.rsplit(".", 1)[-1] for part in parts[1:])])
    return short if short not in module.weights else "_and_".join(parts)


def _check_blocks(joined: Weight, part: Weight) -> None:
    """Raise TypeRuleError when a part ends inside a scale block, which matrix units could not follow."""
    assert isinstance(joined.type, TensorType) and isinstance(part.type, TensorType)
    if joined.type.quant != part.type.quant:
        raise TypeRuleError(f"a part ends inside a block of {part.type.quant}")
