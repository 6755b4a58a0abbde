"""Integer expressions over named sizes, as text: `ceildiv(M, BM) * ceildiv(N, BN)`.

Grids, scalar arguments, operations, bytes and requirements of a kernel are kept as text so that the same declaration is
evaluated, stored beside the compiled kernel and printed in the documentation. Evaluated without `eval`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar

from moec.errors import InputError

_SHOWN = 200
"""Characters of an expression, and of what is wrong with it, in a message."""


class BadExpression(InputError):
    """Text that is no integer expression, or one over a size that is not given."""

    template: ClassVar[str] = "expression '{text}': {reason}"

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text=_short(text), reason=_short(reason))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.LtE: operator.le,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
}
FUNCTIONS: dict[str, Callable[..., int]] = {"ceildiv": lambda a, b: -(-a // b), "min": min, "max": max}


@lru_cache(maxsize=512)
def parse(text: str) -> ast.expr:
    """The syntax tree of `text`. Raises BadExpression when it is not one expression."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise BadExpression(text=text, reason=error.msg) from None
    except (ValueError, MemoryError, RecursionError):
        raise BadExpression(text=text, reason="is nested too deeply or holds what is no text") from None


Values = Mapping[str, object]


@lru_cache(maxsize=8192)
def compiled(text: str) -> Callable[[Values], int]:
    """`text` as a function of its sizes: a launch evaluates the same few expressions in every step.

    Raises BadExpression for what is no integer expression.
    """

    def size(name: str) -> Callable[[Values], int]:
        def given(values: Values) -> int:
            found = values.get(name)
            if not isinstance(found, int):
                raise BadExpression(text=text, reason=f"size '{name}' is not given")
            return int(found)

        return given

    def build(node: ast.expr) -> Callable[[Values], int]:
        match node:
            case ast.Constant(value=int(value)):
                return lambda values: value
            case ast.Name(id=name):
                return size(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
                do, a, b = BINARY[type(op)], build(left), build(right)
                return lambda values: do(a(values), b(values))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
                holds, a, b = COMPARE[type(op)], build(left), build(right)
                return lambda values: int(holds(a(values), b(values)))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                call, each = FUNCTIONS[name], [build(x) for x in arguments]
                return lambda values: call(*[x(values) for x in each])
            case _:
                raise BadExpression(text=text, reason=f"'{ast.unparse(node)}' is not allowed here")

    return build(parse(text))


def evaluate(text: str, values: Values) -> int:
    """The value of `text` with the sizes in `values`; a comparison gives 0 or 1. Raises BadExpression."""
    try:
        return compiled(text)(values)
    except (ZeroDivisionError, TypeError) as error:
        raise BadExpression(text=text, reason=str(error)) from None
    except RecursionError:
        raise BadExpression(text=text, reason="is nested too deeply") from None


def substitute(text: str, values: Mapping[str, int | str]) -> str:
    """`text` with names replaced by numbers or expressions, and what is then constant computed."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id not in values:
                return node
            return parse(str(values[node.id]))

        def visit_Call(self, node: ast.Call) -> ast.expr:
            # The function's own name is no size.
            return ast.Call(node.func, [self.visit(a) for a in node.args], node.keywords)

    def fold(node: ast.expr) -> ast.expr:
        for name, child in ast.iter_fields(node):
            if isinstance(child, ast.expr):
                setattr(node, name, fold(child))
            elif isinstance(child, list):
                setattr(node, name, [fold(c) if isinstance(c, ast.expr) else c for c in child])
        if isinstance(node, ast.BinOp | ast.Call) and not any(isinstance(n, ast.Name) for n in sizes(node)):
            return ast.Constant(evaluate(ast.unparse(node), {}))
        return node

    def sizes(node: ast.expr) -> list[ast.AST]:
        functions = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        return [n for n in ast.walk(node) if id(n) not in functions]

    tree = Replace().visit(ast.parse(text.strip(), mode="eval").body)
    return ast.unparse(fold(tree))
