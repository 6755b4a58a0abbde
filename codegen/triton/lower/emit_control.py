"""Which layers run, in which order, and what waits for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.groups import Group
from moec.ir import CacheType, Value

if TYPE_CHECKING:
    from moec.codegen.triton.lower.lower import Lowering


def repeat(low: Lowering, group: Group) -> None:
    """A layer function for each layer of a range: its results take the places of the leading arguments."""
    from moec.codegen.triton.lower.lower import Layer, Lowering

    op = group.anchor
    function = low.phase.module.functions[str(op.attrs["func"])]
    env: dict[Value, Any] = {function.args[0]: Layer(0, 1)}
    for argument, operand in zip(function.args[1:], op.operands, strict=True):
        if isinstance(operand.type, CacheType):
            env[argument] = low.env[operand]  # type: ignore[index]
        else:
            env[argument] = low.place(operand)
    into = {}
    for state, returned, result in zip(op.operands, function.returns, op.results, strict=False):
        assert isinstance(state, Value)
        others = [o for o in low.uses[state] if o is not op]
        if others or state in low.function.args:
            raise NoKernel(op=op.name, reason=f"%{state.name} is changed in place while another op reads it")
        low.env[result] = into[returned] = low.place(state)
    inner = Lowering(low.phase, function, env, into, loops=True)
    low.steps.append({"repeat": [op.attrs["first"], op.attrs["last"]], "function": function.name, "steps": inner.steps})
    low.callees.append(inner)
    inner.run()


def affine(low: Lowering, group: Group) -> None:
    """A layer that the loop's own leads to: a turn of the loop may run several."""
    from moec.codegen.triton.lower.lower import Layer

    op = group.anchor
    layer = low.env[op.operands[0]]  # type: ignore[index]
    scale, offset = int(op.attrs["scale"]), int(op.attrs["offset"])  # type: ignore[arg-type]
    low.env[op.result] = Layer(layer.index * scale + offset, layer.turn * scale)


def call(low: Lowering, group: Group) -> None:
    """A layer function for one layer; its results take buffers of their own."""
    from moec.codegen.triton.lower.lower import Layer, Lowering

    op = group.anchor
    function = low.phase.module.functions[str(op.attrs["func"])]
    env: dict[Value, Any] = {function.args[0]: Layer(int(op.attrs["layer"]), 0)}  # type: ignore[arg-type]
    for argument, operand in zip(function.args[1:], op.operands, strict=True):
        if isinstance(operand.type, CacheType):
            env[argument] = low.env[operand]  # type: ignore[index]
        else:
            env[argument] = low.place(operand)
    into = {}
    for returned, result in zip(function.returns, op.results, strict=True):
        if returned in function.args and low.uses[op.operands[function.args.index(returned) - 1]] == [op]:  # type: ignore[index]
            low.env[result] = env[returned]  # handed on as it is
        else:
            into[returned] = low.place(result)
    inner = Lowering(low.phase, function, env, into)
    low.callees.append(inner)
    inner.run()
    # One layer is no loop: its steps stand where the call does.
    low.steps.append({"repeat": [0, 0], "function": function.name, "steps": inner.steps})


def event(low: Lowering, group: Group) -> None:
    """Record an event on a stream, or make a stream wait for it."""
    op = group.anchor
    low.steps.append({op.name.removeprefix("event."): op.attrs["event"], "stream": op.attrs["stream"]})
