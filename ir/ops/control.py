"""Calling layer functions, for one layer or for a range, and arithmetic on the layer's index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.module import Function, Module
from moec.ir.optable import INT, STR, Attrs, OpDef, TypeRuleError, index, require
from moec.ir.types import IndexType, Type


class IndexAffine(OpDef):
    """The layer `scale · l + offset`: one of several layers that a turn of a `repeat` is made of, or works behind."""

    name = "index.affine"
    operands = "l"
    attrs = {"scale": INT, "offset": INT}

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        index(t[0])
        require(int(a["scale"]) >= 1, "scale must be at least 1")
        return [IndexType()]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        return [x[0] * a["scale"] + a["offset"]]


class Repeat(OpDef):
    """Run a layer function for layers `first..last`: results of one layer are the leading arguments of the next."""

    name = "repeat"
    operands = "args*"
    attrs = {"func": STR, "first": INT, "last": INT}
    results = "results*"
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        function = _callee(t, a, module)
        require(int(a["first"]) <= int(a["last"]), f"empty layer range {a['first']}..{a['last']}")
        results = [v.type for v in function.returns]
        require(list(t[: len(results)]) == results, f"@{function.name} must return the types of its leading arguments")
        return results

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        function = ctx.module.functions[str(a["func"])]
        state = list(x)
        for layer in range(int(a["first"]), int(a["last"]) + 1):
            results = ctx.call(function, [layer, *state])
            state[: len(results)] = results
        return state[: len(function.returns)]


class Call(OpDef):
    """Run a layer function for one layer: the index `layer` comes first, the operands follow."""

    name = "call"
    operands = "args*"
    attrs = {"func": STR, "layer": INT}
    results = "results*"
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        return [v.type for v in _callee(t, a, module).returns]

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        results: list[Any] = ctx.call(ctx.module.functions[str(a["func"])], [a["layer"], *x])
        return results


def _callee(t: Sequence[Type], a: Attrs, module: Module | None) -> Function:
    """The layer function that is called; raises TypeRuleError unless it takes the layer's index and then `t`."""
    name = str(a["func"])
    if module is None or name not in module.functions:
        raise TypeRuleError(f"no function @{name} above this line")
    wanted = [v.type for v in module.functions[name].args]
    require(wanted[:1] == [IndexType()], f"@{name} must take the layer index first")
    require(list(t) == wanted[1:], f"arguments of @{name} differ: want {_list(wanted[1:])}, got {_list(t)}")
    return module.functions[name]


def _list(types: Sequence[Type]) -> str:
    return "(" + ", ".join(map(str, types)) + ")"
