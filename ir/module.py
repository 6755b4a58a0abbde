"""Structures of the IR: module, weights, functions, ops, values. They hold; printing and checking live beside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moec.ir.types import Type

ENTRIES = ("prefill", "decode", "draft")
"""Functions that a runtime calls; `draft` is a multi-token-prediction module."""

Attribute = int | float | bool | str | tuple["Attribute", ...]


@dataclass(frozen=True)
class Location:
    """Where an op comes from: the model's file and line, then the passes that made it, oldest first."""

    file: str
    line: int
    passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Characters that end a location in the text form; a file on disk may have them in its name.
        object.__setattr__(self, "file", re.sub(r"[^\w./\- ]", "_", self.file).strip() or "_")

    def __str__(self) -> str:
        return f"loc({', '.join([f'{self.file}:{self.line}', *self.passes])})"

    def through(self, pass_name: str) -> Location:
        """The location of an op that `pass_name` made out of one at this location."""
        return Location(self.file, self.line, (*self.passes, pass_name))


class Value:
    """An SSA value: the result of an op or an argument. Identity is the object, the name is for reading."""

    __slots__ = ("name", "type")

    def __init__(self, name: str, type: Type) -> None:
        self.name = name
        self.type = type

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(frozen=True)
class WeightRef:
    """A use of a weight, `@experts.down[%l]`; the indices left open become leading dims of its type."""

    name: str
    indices: tuple[Value, ...] = ()
    type: Type | None = None

    def __repr__(self) -> str:
        return f"@{self.name}"


Operand = Value | WeightRef


@dataclass(eq=False)
class Op:
    """One operation. `results` are fresh values; `attrs` are plain data checked by the op table."""

    name: str
    operands: list[Operand]
    attrs: dict[str, Attribute]
    results: list[Value]
    loc: Location | None = None

    @property
    def result(self) -> Value:
        """The only result; raises ValueError when there are none or several."""
        (value,) = self.results
        return value

    def values(self) -> Iterator[Value]:
        """Every value that the op uses, those inside weight references included."""
        for operand in self.operands:
            if isinstance(operand, Value):
                yield operand
            else:
                yield from operand.indices


@dataclass(eq=False)
class Function:
    """A straight line of ops; `returns` are its results."""

    name: str
    args: list[Value]
    ops: list[Op] = field(default_factory=list)
    returns: list[Value] = field(default_factory=list)
    attrs: dict[str, Attribute] = field(default_factory=dict)

    def producer(self) -> dict[Value, Op]:
        """The op that defines each value (arguments are absent)."""
        return {r: op for op in self.ops for r in op.results}

    def uses(self) -> dict[Value, list[Op]]:
        """The ops that use each value, in order; a return is not an op."""
        out: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in dict.fromkeys(op.values()):
                out.setdefault(value, []).append(op)
        return out


@dataclass(eq=False)
class Weight:
    """A weight symbol and the program that makes it from a checkpoint, once per point of its index ranges.

    `indices` are (name, start, stop), outermost first: layers, then experts. `type` is that of one point.
    """

    name: str
    type: Type
    indices: tuple[tuple[str, int, int], ...]
    program: Function

    def points(self) -> int:
        """Number of index points."""
        total = 1
        for _, start, stop in self.indices:
            total *= stop - start
        return total


@dataclass(eq=False)
class Module:
    """A model at one stage of compilation: weights with their programs, and functions (entry points and layers)."""

    name: str
    attrs: dict[str, Attribute] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)

    def ops(self) -> Iterator[tuple[Function, Op]]:
        """All ops of all functions, weight programs excluded."""
        for function in self.functions.values():
            for op in function.ops:
                yield function, op

    def __str__(self) -> str:
        from moec.ir.printer import print_module

        return print_module(self)
