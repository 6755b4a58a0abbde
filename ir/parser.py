"""Text to IR, with every rule checked on the way: errors carry line, column and a caret.

The parser reads at a position with small regular expressions (`lexer`), types and attributes by `type_parser`; it never
evaluates text and is linear in its input.
"""

from __future__ import annotations

import re

from moec.errors import near
from moec.ir.builder import weight_ref
from moec.ir.dims import DimError
from moec.ir.lexer import ParseError
from moec.ir.module import Function, Location, Module, Op, Operand, Value, Weight
from moec.ir.optable import OPS, TypeRuleError, infer, placement
from moec.ir.printer import VERSION
from moec.ir.type_parser import SYMBOL, TypeParser
from moec.ir.types import IndexType, TensorType, Type

__all__ = ["ParseError", "parse_module"]

NAME = re.compile(r"[A-Za-z_0-9][\w.\-]*")
MODULE_NAME = re.compile(r"\w[\w.\-]*")
LOCATION = re.compile(r"loc\(([^(),\n]+):(\d{1,9})((?:, [\w.\-]+)*)\)")


def parse_module(text: str, file: str = "<text>") -> Module:
    """Parse and check a module; raises ParseError at the first thing that is wrong."""
    return _Parser(text, file).module()


class _Parser(TypeParser):
    def __init__(self, text: str, file: str) -> None:
        super().__init__(text, file)
        self.values: dict[str, Value] = {}
        self.in_program = False
        self.parsed = Module("")

    def module(self) -> Module:
        if not self.keyword("module"):
            self.fail("expected 'module'")
        self.expect("@")
        self.parsed.name = self.match(MODULE_NAME, "a module name")
        self.skip()
        at = self.at
        attrs = self.attrs() if self.attrs_ahead() else {}
        version = attrs.pop("version", None)
        if version != VERSION:
            self.fail(f"text version {version} is not the version {VERSION} that this moec reads", at)
        self.parsed.attrs = attrs
        self.expect("{")
        while not self.accept("}"):
            if self.keyword("weight"):
                self.weight()
            elif self.keyword("func"):
                self.function()
            else:
                self.fail("expected 'weight', 'func' or '}'")
        self.skip()
        if self.at < len(self.text):
            self.fail("text after the end of the module")
        return self.parsed

    def weight(self) -> None:
        self.expect("@")
        at = self.at
        name = self.match(SYMBOL, "a weight name")
        if name in self.parsed.weights:
            self.fail(f"weight @{name} is defined twice", at)
        indices: list[tuple[str, int, int]] = []
        if self.accept("["):
            while True:
                index = self.match(re.compile(r"[A-Za-z_]\w*"), "an index name")
                self.expect(":")
                start = self.integer("a range start")
                self.expect("..")
                stop = self.integer("a range end")
                if stop <= start:
                    self.fail(f"empty range {start}..{stop}")
                if any(index == i[0] for i in indices):
                    self.fail(f"index {index} is used twice")
                indices.append((index, start, stop))
                if not self.accept(","):
                    break
            self.expect("]")
        self.expect(":")
        self.skip()
        at = self.at
        type_ = self.type()
        if not isinstance(type_, TensorType):
            self.fail("a weight must be a tensor", at)
        program = Function(name, [Value(i[0], IndexType()) for i in indices])
        self.in_program = True
        self.body(program)
        self.in_program = False
        if [v.type for v in program.returns] != [type_]:
            got = ", ".join(str(v.type) for v in program.returns) or "nothing"
            self.fail(f"the program of @{name} returns {got}, its type is {type_}", at)
        self.parsed.weights[name] = Weight(name, type_, tuple(indices), program)

    def function(self) -> None:
        self.expect("@")
        at = self.at
        name = self.match(SYMBOL, "a function name")
        if name in self.parsed.functions:
            self.fail(f"function @{name} is defined twice", at)
        function = Function(name, [])
        names: set[str] = set()
        self.expect("(")
        while not self.accept(")"):
            if function.args:
                self.expect(",")
            self.expect("%")
            arg = self.match(NAME, "an argument name")
            if arg in names:
                self.fail(f"argument %{arg} is defined twice", self.at - len(arg) - 1)
            names.add(arg)
            self.expect(":", " and a type")
            function.args.append(Value(arg, self.type()))
        self.skip()
        at = self.at
        declared = self.result_types() if self.accept("->") else []
        function.attrs = self.attrs() if self.attrs_ahead() else {}
        self.body(function)
        if declared != [v.type for v in function.returns]:
            got = ", ".join(str(v.type) for v in function.returns) or "nothing"
            self.fail(f"@{name} returns {got}, its signature says {', '.join(map(str, declared)) or 'nothing'}", at)
        self.parsed.functions[name] = function

    def result_types(self) -> list[Type]:
        if not self.accept("("):
            return [self.type()]
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        self.expect(")")
        return types

    def body(self, function: Function) -> None:
        self.expect("{")
        self.values = {a.name: a for a in function.args}
        while not self.keyword("return"):
            if self.peek("}"):
                self.fail("expected 'return' before '}'")
            self.op(function)
        if not self.peek("}"):
            function.returns.append(self.use())
            while self.accept(","):
                function.returns.append(self.use())
        self.expect("}")

    def use(self) -> Value:
        self.skip()
        at = self.at
        self.expect("%")
        name = self.match(NAME, "a value name")
        if name not in self.values:
            self.fail(f"%{name} is used before it is defined", at)
        return self.values[name]

    def operand(self) -> Operand:
        if not self.peek("@"):
            return self.use()
        at = self.at
        self.at += 1
        name = self.match(SYMBOL, "a weight name")
        if name not in self.parsed.weights:
            self.fail(f"no weight @{name}{near(name, list(self.parsed.weights))}", at)
        weight = self.parsed.weights[name]
        indices: list[Value] = []
        if self.accept("["):
            indices.append(self.use())
            while self.accept(","):
                indices.append(self.use())
            self.expect("]")
        if len(indices) > len(weight.indices):
            self.fail(f"@{name} has {len(weight.indices)} indices, got {len(indices)}", at)
        if any(not isinstance(i.type, IndexType) for i in indices):
            self.fail(f"@{name} must be indexed by an index value", at)
        return weight_ref(weight, indices)

    def op(self, function: Function) -> None:
        self.skip()
        start = self.at
        names: dict[str, int] = {}
        if self.peek("%"):
            while True:
                self.expect("%")
                at = self.at - 1
                name = self.match(NAME, "a value name")
                if name in self.values or name in names:
                    self.fail(f"%{name} is defined twice", at)
                names[name] = at
                if not self.accept(","):
                    break
            self.expect("=")
        self.skip()
        at_name = self.at
        name = self.match(SYMBOL, "an op name")
        if name not in OPS:
            self.fail(f"unknown op {name}{near(name, list(OPS))}", at_name)
        misplaced = placement(name, in_program=self.in_program)
        if misplaced:
            self.fail(misplaced, at_name)
        operands: list[Operand] = []
        if self.peek("%") or self.peek("@"):
            operands.append(self.operand())
            while self.accept(","):
                operands.append(self.operand())
        attrs = self.attrs() if self.peek("{") else {}
        try:
            inferred = infer(OPS[name], operands, attrs, self.parsed)
        except (TypeRuleError, DimError) as error:
            self.fail(f"{name}: {error}", at_name)
        if len(names) != len(inferred):
            self.fail(f"{name} has {len(inferred)} results, the text names {len(names)}", start)
        results = [Value(n, t) for n, t in zip(names, inferred, strict=True)]
        if results:
            self.expect(":", f" and the type of %{results[0].name}")
        for i, value in enumerate(results):
            if i:
                self.expect(",")
            self.skip()
            at = self.at
            stated = self.type()
            if stated != value.type:
                self.fail(f"{name} gives {value.type}, the text says {stated}", at)
        self.values.update({v.name: v for v in results})
        function.ops.append(Op(name, operands, attrs, results, self.location()))

    def location(self) -> Location | None:
        self.skip()
        match = LOCATION.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        passes = tuple(p for p in match.group(3).split(", ") if p)
        return Location(match.group(1), int(match.group(2)), passes)
