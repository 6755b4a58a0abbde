"""Types, dims and attribute values in IR text: the parts of the grammar that know no module.

Nothing recurses deeper than attribute lists may nest, and no text is evaluated.
"""

from __future__ import annotations

import json
import re

from moec.errors import near
from moec.ir.dims import DimError, Size, parse_dim
from moec.ir.lexer import MAX_DIGITS, Lexer
from moec.ir.module import Attribute
from moec.ir.types import BITS, CACHE_KINDS, SCALE_BITS, CacheType, IndexType, Quant, TensorType, Type

SYMBOL = re.compile(r"[A-Za-z_][\w.\-]*")
NUMBER = re.compile(r"-?(?:inf\b|nan\b|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
GRANULARITY = re.compile(r"\d+x\d+\b")
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
DTYPE = re.compile(r"[a-z]\w*(?:\.\w+)?")
MAX_NESTING = 8


class TypeParser(Lexer):
    """Reads types and attribute lists."""

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
            return self.cache(name, shape)
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

    def cache(self, name: str, shape: tuple[Size, ...]) -> CacheType:
        """What stands in `of(...)`: an element type, or a scaled one and the width that is kept in BF16."""
        dtype = self.choice(BITS, "element type")
        if not self.accept("scale("):
            self.expect(")")
            return CacheType(name, shape, dtype)
        scale = self.choice(SCALE_BITS, "scale format")
        self.expect(",")
        self.skip()
        at = self.at
        quant = Quant(scale, self.block(len(shape)))
        if quant.block[-1] == 0:
            self.fail("a cache has a scale for a block of each row", at)
        self.expect(")")
        self.expect(",")
        self.skip()
        at = self.at
        kept = self.match(re.compile(r"bf16 +(\d{1,7})"), "the width kept exact, such as bf16 64")
        self.expect(")")
        exact, width = int(kept.split()[1]), shape[-1] if shape else 0
        if not isinstance(width, int) or exact >= width:
            self.fail(f"{exact} of {width} elements of a row cannot be kept exact", at)
        return CacheType(name, shape, dtype, quant, exact)

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

    def attrs_ahead(self) -> bool:
        """Whether `{` opens attributes (a name and `=`) rather than a body."""
        self.skip()
        return re.compile(r"\{\s*[A-Za-z_]\w*\s*=").match(self.text, self.at) is not None

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
