"""IR to text. The text parses back to an equal module, and printing that gives the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from moec.ir.module import Attribute, Function, Module, Op, Operand, Value, Weight, WeightRef

VERSION = 1
"""Version of the text form; written in every file, checked when parsing."""

BARE = re.compile(r"(?:(?!(?:true|false|inf|nan|loc)\b)[A-Za-z_][\w.\-]*|[0-9]+x[0-9]+)\Z")
"""Strings that read back as names or granularities without quotes; the words of the grammar do not."""


def print_module(module: Module, *, locations: bool = True) -> str:
    """The whole module as text, ending in a newline."""
    header = print_attrs({"version": VERSION, **module.attrs})
    parts = [f"module @{module.name}{header} {{"]
    parts += [_weight(w, locations) for w in module.weights.values()]
    parts += [print_function(f, locations=locations, indent="  ") for f in module.functions.values()]
    return "\n".join([*parts, "}"]) + "\n"


def print_function(function: Function, *, locations: bool = True, indent: str = "") -> str:
    """One function as text."""
    args = ", ".join(f"%{a.name}: {a.type}" for a in function.args)
    types = [str(v.type) for v in function.returns]
    arrow = "" if not types else f" -> {types[0]}" if len(types) == 1 else f" -> ({', '.join(types)})"
    return "\n".join(
        [
            f"{indent}func @{function.name}({args}){arrow}{print_attrs(function.attrs)} {{",
            *_body(function, indent, locations),
        ]
    )


def _weight(weight: Weight, locations: bool) -> str:
    ranges = ", ".join(f"{name}: {start}..{stop}" for name, start, stop in weight.indices)
    head = f"  weight @{weight.name}{f'[{ranges}]' if ranges else ''}: {weight.type} {{"
    return "\n".join([head, *_body(weight.program, "  ", locations)])


def _body(function: Function, indent: str, locations: bool) -> list[str]:
    lines = [f"{indent}  {print_op(op, locations=locations)}" for op in function.ops]
    returned = ", ".join(f"%{v.name}" for v in function.returns)
    lines.append(f"{indent}  return {returned}".rstrip())
    return [*lines, indent + "}"]


def print_op(op: Op, *, locations: bool = True) -> str:
    """One op as text, without indentation."""
    results = ", ".join(f"%{r.name}" for r in op.results)
    operands = ", ".join(map(print_operand, op.operands))
    text = f"{results} = {op.name}" if results else op.name
    text += f" {operands}" if operands else ""
    text += print_attrs(op.attrs)
    if op.results:
        text += " : " + ", ".join(str(r.type) for r in op.results)
    return f"{text} {op.loc}" if op.loc and locations else text


def print_operand(operand: Operand) -> str:
    """`%x`, `@w` or `@w[%l]`."""
    if isinstance(operand, Value):
        return f"%{operand.name}"
    assert isinstance(operand, WeightRef)
    index = ", ".join(f"%{i.name}" for i in operand.indices)
    return f"@{operand.name}[{index}]" if index else f"@{operand.name}"


def print_attrs(attrs: Mapping[str, Attribute]) -> str:
    """` {key = value, ...}`, or nothing."""
    if not attrs:
        return ""
    return " {" + ", ".join(f"{k} = {print_attribute(v)}" for k, v in attrs.items()) + "}"


def print_attribute(value: Attribute) -> str:
    """One attribute value; strings are quoted unless they read as a name or a granularity."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(print_attribute, value)) + "]"
    return value if BARE.match(value) else json.dumps(value)
