"""Symbolic dimensions: integers or expressions over named symbols, such as `T*8` or `ceildiv(T, 128)`.

Sympy does the algebra behind a cached wrapper, so that equal expressions are one object and print alike. The parser is
a small recursive descent; nothing is ever passed to `eval`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

MAX_DIM = 2**62
MAX_TEXT = 400
MAX_DEPTH = 24
MAX_TERMS = 32
MAX_CHOICES = 4
"""Terms of a sum, and minima and maxima of two, in one expression: many more would cost sympy minutes."""

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(//|[-+*(),]))")


class DimError(ValueError):
    """A dimension expression that does not parse or leaves the integers."""


class Dim:
    """A symbolic dimension; compare and hash by its canonical text. Build with `dim()` or arithmetic."""

    __slots__ = ("expr", "text")

    def __init__(self, expr: Any, text: str) -> None:
        self.expr = expr
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __add__(self, other: Size) -> Size:
        return _binary("add", self, other)

    def __radd__(self, other: Size) -> Size:
        return _binary("add", other, self)

    def __sub__(self, other: Size) -> Size:
        return _binary("sub", self, other)

    def __rsub__(self, other: Size) -> Size:
        return _binary("sub", other, self)

    def __mul__(self, other: Size) -> Size:
        return _binary("mul", self, other)

    def __rmul__(self, other: Size) -> Size:
        return _binary("mul", other, self)

    def __floordiv__(self, other: Size) -> Size:
        return _binary("floordiv", self, other)

    def symbols(self) -> frozenset[str]:
        """Names of the free symbols."""
        return frozenset(str(s) for s in self.expr.free_symbols)

    def renamed(self, names: Mapping[str, str]) -> Size:
        """The same expression with other names for some of its symbols."""
        symbols = {s: symbol(names[str(s)]).expr for s in self.expr.free_symbols if str(s) in names}
        return _wrap(self.expr.xreplace(symbols)) if symbols else self

    def bind(self, values: Mapping[str, int]) -> int:
        """The integer value under `values`; raises DimError when a symbol is missing."""
        missing = self.symbols() - set(values)
        if missing:
            raise DimError(f"no value for {', '.join(sorted(missing))} in {self.text}")
        value = self.expr.subs({s: values[str(s)] for s in self.expr.free_symbols})
        if not value.is_Integer:
            raise DimError(f"{self.text} has no integer value")
        return int(value)


Size = int | Dim


def _sympy() -> Any:
    import sympy

    return sympy


@lru_cache(maxsize=4096)
def _binary(kind: str, a: Size, b: Size) -> Size:
    s = _sympy()
    x = a.expr if isinstance(a, Dim) else s.Integer(a)
    y = b.expr if isinstance(b, Dim) else s.Integer(b)
    if _terms(x) * _terms(y) > MAX_TERMS or _choices(x) + _choices(y) > MAX_CHOICES:
        raise DimError("dimension expression has too many terms")
    table: dict[str, Callable[[], Any]] = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: s.expand(x * y),
        "floordiv": lambda: _floordiv(x, y),
        "ceildiv": lambda: _ceildiv(x, y),
        "min": lambda: s.Min(x, y),
        "max": lambda: s.Max(x, y),
    }
    return _wrap(table[kind]())


def _floordiv(x: Any, y: Any) -> Any:
    if y == 0:
        raise DimError("division by zero in a dimension")
    exact = _quotient(x, y)
    return _sympy().floor(x / y) if exact is None else exact


def _ceildiv(x: Any, y: Any) -> Any:
    if y == 0:
        raise DimError("division by zero in a dimension")
    exact = _quotient(x, y)
    return _sympy().ceiling(x / y) if exact is None else exact


def _quotient(x: Any, y: Any) -> Any:
    """x / y where every coefficient of x divides, else None: sympy would ask long whether the result is an integer."""
    if not y.is_Integer:
        return None
    parts = x.as_coefficients_dict()
    return _sympy().Add(*(t * (c / y) for t, c in parts.items())) if all(c % y == 0 for c in parts.values()) else None


def _wrap(expr: Any) -> Size:
    if expr.is_Integer:
        value = int(expr)
        if abs(value) > MAX_DIM:
            raise DimError("dimension too large (limit 2^62)")
        return value
    text = _text(expr)
    if len(text) > MAX_TEXT:
        raise DimError("dimension expression too long")
    return Dim(expr, text)


def _terms(expr: Any) -> int:
    """Summands of an expression."""
    return len(expr.args) if expr.is_Add else 1


def _choices(expr: Any) -> int:
    """Minima and maxima of two in an expression."""
    s = _sympy()
    return sum(len(e.args) - 1 for e in expr.atoms(s.Min, s.Max))


def _text(expr: Any) -> str:
    s = _sympy()
    if expr.is_Integer:
        return str(int(expr))
    if expr.is_Symbol:
        return str(expr)
    if isinstance(expr, (s.Min, s.Max)):
        name = "min" if isinstance(expr, s.Min) else "max"
        args = sorted(_text(a) for a in expr.args)
        out = args[0]
        for a in args[1:]:
            out = f"{name}({out}, {a})"
        return out
    if isinstance(expr, (s.floor, s.ceiling)):
        numerator, denominator = s.fraction(s.together(expr.args[0]))
        name = "floordiv" if isinstance(expr, s.floor) else "ceildiv"
        return f"{name}({_text(numerator)}, {_text(denominator)})"
    if expr.is_Add:
        terms = sorted(expr.args, key=lambda a: (a.is_number, _text(a)))
        out = _text(terms[0])
        for t in terms[1:]:
            part = _text(t)
            out += f" - {part[1:]}" if part.startswith("-") else f" + {part}"
        return out
    if expr.is_Mul:
        coefficient, rest = expr.as_coeff_mul()
        factors = sorted(f"({_text(f)})" if f.is_Add else _text(f) for f in rest)
        if coefficient == -1:
            return "-" + "*".join(factors)
        return (
            "*".join(factors + ([] if coefficient == 1 else [_text(coefficient)]))
            if coefficient >= 0
            else ("-" + "*".join([*factors, _text(-coefficient)]))
        )
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        base = f"({_text(expr.base)})" if not expr.base.is_Symbol else _text(expr.base)
        return "*".join([base] * int(expr.exp))
    raise DimError(f"a dimension must be an integer expression, got {expr}")


@lru_cache(maxsize=4096)
def symbol(name: str) -> Dim:
    """The positive integer symbol `name`."""
    return Dim(_sympy().Symbol(name, integer=True, positive=True), name)


def dim(value: int | str | Dim) -> Size:
    """An integer, a `Dim`, or the parse of a text such as `T*8`."""
    return parse_dim(value) if isinstance(value, str) else value


def ceildiv(a: Size, b: Size) -> Size:
    """ceil(a / b) for integers or symbolic sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    return _binary("ceildiv", a, b)


def minimum(a: Size, b: Size) -> Size:
    """The lesser of two sizes."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else _binary("min", a, b)


def bind(size: Size, values: Mapping[str, int]) -> int:
    """The integer value of a size under `values`."""
    return size if isinstance(size, int) else size.bind(values)


@lru_cache(maxsize=4096)
def parse_dim(text: str) -> Size:
    """Parse a dimension expression; raises DimError."""
    if len(text) > MAX_TEXT:
        raise DimError("dimension expression too long")
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise DimError(f"unexpected character {text[position:].lstrip()[:1]!r} in dimension {text!r}")
        tokens.append(match.group(match.lastindex or 0))
        position = match.end()
    parser = _Parser(tokens, text)
    result = parser.sum(0)
    if parser.tokens:
        raise DimError(f"unexpected {parser.tokens[0]!r} in dimension {text!r}")
    return result


class _Parser:
    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens = tokens
        self.text = text

    def take(self) -> str:
        if not self.tokens:
            raise DimError(f"dimension {self.text!r} ends too early")
        return self.tokens.pop(0)

    def expect(self, token: str) -> None:
        got = self.take()
        if got != token:
            raise DimError(f"expected {token!r}, got {got!r} in dimension {self.text!r}")

    def sum(self, depth: int) -> Size:
        if depth > MAX_DEPTH:
            raise DimError("dimension expression nested too deeply")
        left = self.product(depth)
        while self.tokens and self.tokens[0] in "+-":
            kind = "add" if self.take() == "+" else "sub"
            left = _binary(kind, left, self.product(depth))
        return left

    def product(self, depth: int) -> Size:
        left = self.atom(depth)
        while self.tokens and self.tokens[0] in ("*", "//"):
            kind = "mul" if self.take() == "*" else "floordiv"
            left = _binary(kind, left, self.atom(depth))
        return left

    def atom(self, depth: int) -> Size:
        token = self.take()
        if token == "-":
            return _binary("mul", -1, self.atom(depth + 1)) if depth < MAX_DEPTH else self.sum(depth + 1)
        if token == "(":
            inner = self.sum(depth + 1)
            self.expect(")")
            return inner
        if token.isdigit():
            if len(token) > 19 or int(token) > MAX_DIM:
                raise DimError("dimension too large (limit 2^62)")
            return int(token)
        if token in ("ceildiv", "floordiv", "min", "max") and self.tokens[:1] == ["("]:
            self.expect("(")
            a = self.sum(depth + 1)
            self.expect(",")
            b = self.sum(depth + 1)
            self.expect(")")
            return _binary(token, a, b)
        if token[0].isalpha() or token[0] == "_":
            return symbol(token)
        raise DimError(f"unexpected {token!r} in dimension {self.text!r}")
