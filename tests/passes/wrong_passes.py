"""How tests make shipped passes and op rules wrong: changes behind a pass, and rules put in place of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moec.ir import OPS, Module, Op, Value
from moec.ir.module import Function
from moec.ir.rewrite import replace_values, retype
from moec.passes.base import Context, Outcome, Pass
from moec.passes.manager import PassFailure

Patch = pytest.MonkeyPatch
SMALL = {"num_hidden_layers": "3", "hidden_size": "128", "intermediate_size": "128", "vocab_size": "96"}
Mutation = Callable[[Patch], None]
Mutations = dict[str, tuple[str, Mutation]]


def register(table: Mutations, pass_name: str) -> Callable[[Mutation], Mutation]:
    """Adds a function to the table as a wrong variant of a pass."""

    def add(function: Mutation) -> Mutation:
        table[function.__name__] = (pass_name, function)
        return function

    return add


def after(patch: Patch, pass_: type[Pass], change: Callable[[Module], None]) -> None:
    """The pass, followed by a wrong change to its module."""
    run = pass_.run

    def wrong(self: Pass, module: Module, ctx: Context) -> Outcome:
        out = run(self, module, ctx)
        change(module)
        return out

    patch.setattr(pass_, "run", wrong)


def during(patch: Patch, pass_: type[Pass], start: Callable[[], None]) -> None:
    """The pass, from whose beginning on something is wrong that was right before."""
    run = pass_.run

    def wrong(self: Pass, module: Module, ctx: Context) -> Outcome:
        start()
        return run(self, module, ctx)

    patch.setattr(pass_, "run", wrong)


def first(module: Module, name: str, where: str = "") -> tuple[Function, Op]:
    return next((f, o) for f, o in module.ops() if o.name == name and where in f.name)


def set_attr(patch: Patch, pass_: type[Pass], op: str, key: str, value: Callable[[Any], Any], where: str = "") -> None:
    def change(module: Module) -> None:
        target = first(module, op, where)[1]
        target.attrs[key] = value(target.attrs[key])

    after(patch, pass_, change)


def bypass(patch: Patch, pass_: type[Pass], op: str, where: str = "", keep: int = 0) -> None:
    """Users of an op's first result take one of its operands instead."""

    def change(module: Module) -> None:
        function, target = first(module, op, where)
        kept = target.operands[keep]
        assert isinstance(kept, Value)
        replace_values(function, {target.results[0]: kept})
        function.ops.remove(target)

    after(patch, pass_, change)


def swap(patch: Patch, pass_: type[Pass], op: str, i: int, j: int, where: str = "") -> None:
    def change(module: Module) -> None:
        operands = first(module, op, where)[1].operands
        operands[i], operands[j] = operands[j], operands[i]

    after(patch, pass_, change)


def program(patch: Patch, pass_: type[Pass], weight: str, op: str, change: Callable[[Op], None]) -> None:
    """A wrong change to one op of a weight program."""

    def mutate(module: Module) -> None:
        found = next(
            w for n, w in module.weights.items() if n.endswith(weight) and any(o.name == op for o in w.program.ops)
        )
        change(next(o for o in found.program.ops if o.name == op))
        retype(module)

    after(patch, pass_, mutate)


def rule(patch: Patch, op: str, evaluate: Callable[[Sequence[Any], dict[str, Any], Any], list[Any]]) -> None:
    patch.setattr(OPS[op], "evaluate", evaluate)


def assert_caught(table: Mutations, name: str, patch: Patch, compile_: Callable[[], object]) -> None:
    """The wrong variant stops the compilation behind the pass that it is one of."""
    pass_name, mutate = table[name]
    mutate(patch)
    with pytest.raises(PassFailure, match=f"^after pass {pass_name}: ") as caught:
        compile_()
    assert "\nTraceback" not in str(caught.value)
