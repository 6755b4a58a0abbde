"""Calling layer functions: once, or once per layer with the layer's index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moec.ir.module import Module
from moec.ir.optable import INT, STR, Attrs, OpDef, TypeRuleError, require
from moec.ir.types import IndexType, Type


class Repeat(OpDef):
    """Run a layer function for layers `first..last`: results of one layer are the leading arguments of the next."""

    name = "repeat"
    operands = "args*"
    attrs = {"func": STR, "first": INT, "last": INT}
    results = "results*"
    effect = "write"

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        name = str(a["func"])
        if module is None or name not in module.functions:
            raise TypeRuleError(f"no function @{name} above this line")
        function = module.functions[name]
        require(int(a["first"]) <= int(a["last"]), f"empty layer range {a['first']}..{a['last']}")
        wanted = [v.type for v in function.args]
        require(wanted[:1] == [IndexType()], f"@{name} must take the layer index first")
        require(list(t) == wanted[1:], f"arguments of @{name} differ: want {_list(wanted[1:])}, got {_list(t)}")
        results = [v.type for v in function.returns]
        require(list(t[: len(results)]) == results, f"@{name} must return the types of its leading arguments")
        return results

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        function = ctx.module.functions[str(a["func"])]
        state = list(x)
        for layer in range(int(a["first"]), int(a["last"]) + 1):
            results = ctx.call(function, [layer, *state])
            state[: len(results)] = results
        return state[: len(function.returns)]


def _list(types: Sequence[Type]) -> str:
    return "(" + ", ".join(map(str, types)) + ")"
