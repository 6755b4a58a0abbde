"""An entry function as steps: where the caller's inputs, states and logits lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moec.codegen.triton.errors import NoKernel
from moec.codegen.triton.fused.binding import tensor_of, width
from moec.codegen.triton.lower.lower import Lowering, Phase
from moec.codegen.triton.lower.places import Base, Place, Step
from moec.ir import CacheType, Function, TensorType, Value
from moec.ir.types import BITS


@dataclass
class Lowered:
    """A phase as steps; `arena` bytes for its values."""

    steps: list[Step]
    arena: int
    parts: int = 1
    """Micro-batches, each with inputs of its own."""


def lower_phase(phase: Phase) -> Lowered:
    """Lower an entry function: inputs by name, the cache, and `logits` as the output. Raises NoKernel."""
    function = phase.module.functions[phase.name]
    env: dict[Value, Any] = {}
    for argument in function.args:
        if isinstance(argument.type, CacheType):
            env[argument] = argument.name
        elif argument.name == "hidden":
            env[argument] = _rows_at(argument, "hidden")
        else:
            env[argument] = Place(Base("input", argument.name), 0, 1, 1, 4)
    parts = parts_of(function)
    logits, states = function.returns[:parts], function.returns[parts:]
    into = {v: _rows_at(v, "states") for v in states}
    for number, value in enumerate(logits):
        t = value.type
        if not isinstance(t, TensorType) or t.dtype != "f32":
            raise NoKernel(op="linear", reason=f"logits are {t}, the runtime reads f32")
        # Micro-batches one behind the other, each with room for its most rows.
        into[value] = replace(_rows_at(value, "logits"), offset=number * phase.most(t.nbytes()))
    low = Lowering(phase, function, env, into)
    low.run()
    end = low.settle()
    low.fill()
    return Lowered(low.steps, end, parts)


def parts_of(function: Function) -> int:
    """Micro-batches of an entry."""
    return int(str(function.attrs.get("micro_batches", 1)))


def _rows_at(value: Value, name: str) -> Place:
    """Rows of the caller's, one behind the other."""
    columns = width(value)
    return Place(Base("output", name), 0, columns, columns, BITS[tensor_of(value).dtype] // 8)
