"""Edits that the ways of dividing share: ops behind an op, weight programs of a rank's part."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir import Function, Module, Op, Value, Weight, WeightRef
from moec.ir.mesh import Mesh
from moec.ir.module import Attribute, Operand
from moec.ir.optable import OPS, infer
from moec.ir.rewrite import append_to_program

PASS = "shard"


def insert(
    module: Module, function: Function, at: int, name: str, operands: list[Operand], attrs: Mapping[str, Attribute]
) -> Op:
    """Insert an op before position `at`, with the location of the op that stood there or before."""
    given = dict(attrs)
    number = max((int(r.name[1:]) for o in function.ops for r in o.results if r.name.startswith("s")), default=0)
    results = [Value(f"s{number + i + 1}", t) for i, t in enumerate(infer(OPS[name], operands, given, module))]
    near = function.ops[min(at, len(function.ops) - 1)].loc if function.ops else None
    op = Op(name, operands, given, results, near.through(PASS) if near else None)
    function.ops.insert(at, op)
    return op


def behind(module: Module, function: Function, value: Value, name: str, attrs: Mapping[str, Attribute]) -> Value:
    """Insert an op of one operand behind the op that makes `value`; every later use takes its result."""
    position = next(i for i, op in enumerate(function.ops) if value in op.results)
    op = insert(module, function, position + 1, name, [value], attrs)
    op.loc = function.ops[position].loc.through(PASS) if function.ops[position].loc else None  # type: ignore[union-attr]
    use_instead(function, value, op.result, except_for=op)
    return op.result


def use_instead(function: Function, old: Value, new: Value, except_for: Op) -> None:
    """Every op but one, and the returns, use `new` in place of `old`."""
    for op in function.ops:
        if op is not except_for:
            op.operands = [new if o is old else o for o in op.operands]
    function.returns = [new if v is old else v for v in function.returns]


def cut_weight(weight: Weight, mesh: Mesh, axis: str, dim: int, parts: int = 1, copies: int = 1) -> None:
    """Make the weight's program end in this rank's part; once, however often the weight is used.

    `copies` consecutive ranks get the same part.
    """
    if any(op.name == "weight.shard" for op in weight.program.ops):
        return
    attrs: dict[str, object] = {"axis": axis, "ranks": mesh.size(axis), "dim": dim}
    options = {name: n for name, n in (("parts", parts), ("copies", copies)) if n > 1}
    append_to_program(weight, "weight.shard", **attrs, **options)


def weight_at(module: Module, op: Op, position: int) -> Weight | None:
    """The weight that an op uses as an operand; None when it is another value or absent."""
    ref = op.operands[position] if position < len(op.operands) else None
    return module.weights[ref.name] if isinstance(ref, WeightRef) else None
