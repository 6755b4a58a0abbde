"""Text to IR, with every rule checked on the way: errors carry line, column and a caret.

The parser reads at a position with small regular expressions; it never recurses deeper than attribute lists may nest,
never evaluates text, and is linear in its input.
"""

from __future__ import annotations

import json
import re
from typing import ClassVar, NoReturn

from moec.errors import InputError, near
from moec.ir.builder import weight_ref
from moec.ir.dims import DimError, Size, parse_dim
from moec.ir.module import Attribute, Function, Location, Module, Op, Operand, Value, Weight
from moec.ir.optable import OPS, TypeRuleError, infer, placement
from moec.ir.printer import VERSION
from moec.ir.types import BITS, CACHE_KINDS, SCALE_BITS, CacheType, IndexType, Quant, TensorType, Type

NAME = re.compile(r"[A-Za-z_0-9][\w.\-]*")
SYMBOL = re.compile(r"[A-Za-z_][\w.\-]*")
SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
NUMBER = re.compile(r"-?(?:inf\b|nan\b|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
GRANULARITY = re.compile(r"\d+x\d+\b")
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
MODULE_NAME = re.compile(r"\w[\w.\-]*")
LOCATION = re.compile(r"loc\(([^(),\n]+):(\d{1,9})((?:, [\w.\-]+)*)\)")
DTYPE = re.compile(r"[a-z]\w*(?:\.\w+)?")
MAX_DIGITS = 19
MAX_NESTING = 8


class ParseError(InputError):
    """Text that is not a module: says line and column and shows the place."""

    template: ClassVar[str] = "{file}:{line}:{column}: {message}\n  {text}\n  {caret}"


def parse_module(text: str, file: str = "<text>") -> Module:
    """Parse and check a module; raises ParseError at the first thing that is wrong."""
    return _Parser(text, file).module()


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.at = 0
        self.values: dict[str, Value] = {}
        self.in_program = False
        self.parsed = Module("")

    # Reading.

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        shown = self.text[start : end if end >= 0 else len(self.text)]
        offset = at - start
        left = max(0, offset - 90)
        shown = "".join(c if c.isprintable() else " " for c in shown[left : left + 120])
        raise ParseError(
            file=self.file,
            line=line,
            column=offset + 1,
            message=message,
            text=shown,
            caret=" " * (offset - left) + "^",
        )

    def skip(self) -> None:
        match = SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.at)

    def accept(self, token: str) -> bool:
        if self.peek(token):
            self.at += len(token)
            return True
        return False

    def expect(self, token: str, why: str = "") -> None:
        if not self.accept(token):
            self.fail(f"expected {token!r}{why}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(f"expected {what}")
        self.at = match.end()
        return match.group()

    def integer(self, what: str) -> int:
        self.skip()
        at = self.at
        digits = self.match(re.compile(r"\d+"), what)
        if len(digits) > MAX_DIGITS:
            self.fail(f"{what} has too many digits", at)
        return int(digits)

    def keyword(self, word: str) -> bool:
        self.skip()
        end = self.at + len(word)
        if self.text.startswith(word, self.at) and not re.match(r"[\w.]", self.text[end : end + 1]):
            self.at = end
            return True
        return False

    # Structure.

    def module(self) -> Module:
        if not self.keyword("module"):
            self.fail("expected 'module'")
        self.expect("@")
        self.parsed.name = self.match(MODULE_NAME, "a module name")
        self.skip()
        at = self.at
        attrs = self.attrs() if self._attrs_ahead() else {}
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

    def _attrs_ahead(self) -> bool:
        """Whether `{` opens attributes (a name and `=`) rather than a body."""
        self.skip()
        return re.compile(r"\{\s*[A-Za-z_]\w*\s*=").match(self.text, self.at) is not None

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
        function.attrs = self.attrs() if self._attrs_ahead() else {}
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

    # Types and attributes.

    def type(self) -> Type:
        self.skip()
        at = self.at
        if self.keyword("index"):
            return IndexType()
        name = self.match(DTYPE, "a type")
        if name not in BITS and name not in CACHE_KINDS:
            self.fail(f"unknown type {name}{near(name, [*BITS, *CACHE_KINDS])}", at)
        if not self.text.startswith("[", self.at):
            self.fail(f"expected '[' and the dims of {name}")
        shape = self.dims()
        if name in CACHE_KINDS:
            self.expect("of(")
            dtype = self.choice(BITS, "element type")
            self.expect(")")
            return CacheType(name, shape, dtype)
        quant = layout = sharding = None
        if self.accept("scale("):
            scale = self.choice(SCALE_BITS, "scale format")
            self.expect(",")
            quant = Quant(scale, self.block(len(shape)))
            self.expect(")")
        if self.accept("layout("):
            layout = self.match(SYMBOL, "a layout")
            self.expect(")")
        if self.accept("shard("):
            axes = [self.match(re.compile(r"-|[a-z]+(?:\*[a-z]+)*"), "a mesh axis or '-'")]
            while self.accept(","):
                axes.append(self.match(re.compile(r"-|[a-z]+(?:\*[a-z]+)*"), "a mesh axis or '-'"))
            self.expect(")")
            if len(axes) != len(shape):
                self.fail(f"shard names {len(axes)} dims, the type has {len(shape)}", at)
            sharding = tuple(None if a == "-" else a for a in axes)
        return TensorType(name, shape, quant, layout, sharding)

    def choice(self, known: dict[str, int], what: str) -> str:
        self.skip()
        at = self.at
        name = self.match(SYMBOL, f"a {what}")
        if name not in known:
            self.fail(f"unknown {what} {name}{near(name, list(known))}", at)
        return name

    def block(self, rank: int) -> tuple[int, ...]:
        self.skip()
        at = self.at
        text = self.match(re.compile(r"\d{1,7}(?:x\d{1,7})*"), "a granularity such as 1x128")
        block = tuple(map(int, text.split("x")))
        if len(block) > rank:
            self.fail(f"granularity {text} has more dims than the tensor", at)
        return block

    def dims(self) -> tuple[Size, ...]:
        start = self.at + 1
        close = re.compile(r"[\[\]\n]").search(self.text, start)
        if close is None or close.group() != "]":
            self.fail("expected ']' after the dims", start)
        self.at = close.end()
        inside = self.text[start : close.start()]
        return tuple(self.dim(start + at, text) for at, text in _split(inside)) if inside.strip() else ()

    def dim(self, at: int, text: str) -> Size:
        try:
            size = parse_dim(text.strip())
        except DimError as error:
            self.fail(str(error), at)
        if isinstance(size, int) and size < 0:
            self.fail(f"negative dimension {size}", at)
        return size

    def attrs(self) -> dict[str, Attribute]:
        self.expect("{")
        out: dict[str, Attribute] = {}
        while not self.accept("}"):
            if out:
                self.expect(",", " or '}'")
            self.skip()
            at = self.at
            key = self.match(re.compile(r"[A-Za-z_]\w*"), "an attribute name")
            if key in out:
                self.fail(f"attribute {key} is given twice", at)
            self.expect("=")
            out[key] = self.attribute(0)
        return out

    def attribute(self, depth: int) -> Attribute:
        self.skip()
        at = self.at
        if self.accept("["):
            if depth >= MAX_NESTING:
                self.fail("lists nested too deeply", at)
            items: list[Attribute] = []
            while not self.accept("]"):
                if items:
                    self.expect(",", " or ']'")
                items.append(self.attribute(depth + 1))
            return tuple(items)
        if self.peek('"'):
            quoted = self.match(STRING, "a closed string")
            try:
                return str(json.loads(quoted))
            except ValueError:
                self.fail("bad escape in a string", at)
        for word, value in (("true", True), ("false", False)):
            if self.keyword(word):
                return value
        match = GRANULARITY.match(self.text, self.at)
        if match:
            self.at = match.end()
            return match.group()
        match = NUMBER.match(self.text, self.at)
        if match and not re.match(r"[\w]", self.text[match.end() : match.end() + 1]):
            self.at = match.end()
            return self.number(match.group(), at)
        return self.match(SYMBOL, "a value: a number, a string, true, false, a name or a list")

    def number(self, text: str, at: int) -> Attribute:
        if re.fullmatch(r"-?\d+", text):
            if len(text.removeprefix("-")) > MAX_DIGITS:
                self.fail("integer has too many digits", at)
            return int(text)
        return float(text)


def _split(text: str) -> list[tuple[int, str]]:
    """The parts between commas outside parentheses, each with the position of its first character."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c == "(") - (c == ")")
        if c == "," and (depth == 0 or i == len(text)):
            part = text[start:i]
            parts.append((start + len(part) - len(part.lstrip()), part))
            start = i + 1
    return parts
