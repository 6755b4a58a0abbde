"""The verifier: everything that must hold of a module between passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from moec.errors import MoecError
from moec.ir.builder import weight_ref
from moec.ir.dims import DimError
from moec.ir.module import Function, Module, Op, Value, WeightRef
from moec.ir.optable import OPS, TypeRuleError, infer, placement
from moec.ir.printer import print_op
from moec.ir.schedule import check_schedule
from moec.ir.types import IndexType

CONTEXT = 2


class VerifyError(MoecError):
    """A module that breaks a rule: names function and op, shows the ops around it and where they come from."""

    template: ClassVar[str] = "@{function}: {message}{context}"


def verify(module: Module) -> None:
    """Raise VerifyError unless every function and weight program is well formed and well typed."""
    for weight in module.weights.values():
        if [a.name for a in weight.program.args] != [i[0] for i in weight.indices]:
            raise VerifyError(function=weight.name, message="program arguments differ from the indices", context="")
        _function(module, weight.program, in_program=True)
        if [v.type for v in weight.program.returns] != [weight.type]:
            message = f"the program returns {weight.program.returns}, the weight is {weight.type}"
            raise VerifyError(function=weight.name, message=message, context="")
    for function in module.functions.values():
        _function(module, function)
    check_schedule(module, _refusal)


def _refusal(function: Function, position: int, message: str) -> VerifyError:
    context = context_of(function, position) if position >= 0 else ""
    return VerifyError(function=function.name, message=message, context=context)


def _function(module: Module, function: Function, *, in_program: bool = False) -> None:
    defined: dict[str, Value] = {}

    def define(value: Value, fail: Callable[[str], None]) -> None:
        if value.name in defined:
            fail(f"%{value.name} is defined twice")
        defined[value.name] = value

    def plain(message: str) -> None:
        raise VerifyError(function=function.name, message=message, context="")

    for arg in function.args:
        define(arg, plain)
    for position, op in enumerate(function.ops):

        def fail(message: str, position: int = position) -> None:
            raise VerifyError(function=function.name, message=message, context=context_of(function, position))

        if op.name not in OPS:
            fail(f"unknown op {op.name}")
        misplaced = placement(op.name, in_program=in_program)
        if misplaced:
            fail(misplaced)
        for value in op.values():
            if defined.get(value.name) is not value:
                fail(f"{op.name} uses %{value.name} before it is defined")
        for operand in op.operands:
            if isinstance(operand, WeightRef):
                _weight_use(module, operand, fail)
        _types(module, op, fail)
        for result in op.results:
            define(result, fail)
    for value in function.returns:
        if defined.get(value.name) is not value:
            plain(f"returns %{value.name}, which is not defined")


def _weight_use(module: Module, ref: WeightRef, fail: Callable[[str], None]) -> None:
    weight = module.weights.get(ref.name)
    if weight is None:
        fail(f"no weight @{ref.name}")
        return
    if len(ref.indices) > len(weight.indices):
        fail(f"@{ref.name} has {len(weight.indices)} indices, got {len(ref.indices)}")
    if any(not isinstance(i.type, IndexType) for i in ref.indices):
        fail(f"@{ref.name} must be indexed by an index value")
    expected = weight_ref(weight, ref.indices).type
    if ref.type != expected:
        fail(f"@{ref.name} is {expected}, the op was built for {ref.type}")


def _types(module: Module, op: Op, fail: Callable[[str], None]) -> None:
    try:
        types = infer(OPS[op.name], op.operands, op.attrs, module)
    except (TypeRuleError, DimError) as error:
        fail(f"{op.name}: {error}")
        return
    stated = [r.type for r in op.results]
    if types != stated:
        fail(f"{op.name} gives {', '.join(map(str, types))}, the op says {', '.join(map(str, stated))}")


def context_of(function: Function, position: int) -> str:
    """The ops around a position, the wrong one marked, one a line."""
    lines = []
    for i in range(max(0, position - CONTEXT), min(len(function.ops), position + CONTEXT + 1)):
        lines.append(f"\n  {'>' if i == position else ' '} {print_op(function.ops[i])}")
    return "".join(lines)
