"""The op table: one declaration per op holds its schema, type rule, reference evaluation and cost.

An op is a subclass of `OpDef` with class attributes; defining it registers it. Everything else (printer, parser,
verifier, evaluator, documentation, cost model, emitters) reads the table, so that a new op is added in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moec.ir.dims import MAX_DIM, Size
from moec.ir.module import Attribute, Module, Operand
from moec.ir.types import CacheType, IndexType, TensorType, Type

AttributeValue = Attribute


class TypeRuleError(ValueError):
    """Operands or attributes that an op's rule does not accept."""


@dataclass(frozen=True)
class Attr:
    """Schema of an attribute: its kind (int, float, bool, str, ints, floats), whether it may be absent, its choices."""

    kind: str
    optional: bool = False
    choices: tuple[str, ...] = ()

    def accepts(self, value: Attribute) -> bool:
        """Whether `value` has the declared kind."""
        match self.kind:
            case "int":
                return isinstance(value, int) and not isinstance(value, bool)
            case "float":
                return isinstance(value, float)
            case "bool":
                return isinstance(value, bool)
            case "str":
                return isinstance(value, str) and (not self.choices or value in self.choices)
            case "ints":
                return isinstance(value, tuple) and all(type(v) is int for v in value)
            case "floats":
                return isinstance(value, tuple) and all(type(v) is float for v in value)
        raise AssertionError(self.kind)

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}" if self.choices else self.kind


INT, FLOAT, BOOL, STR, INTS = Attr("int"), Attr("float"), Attr("bool"), Attr("str"), Attr("ints")
Attrs = dict[str, Any]

PLACEMENT: dict[str, tuple[Attr, str]] = {
    "stream": (STR, "the stream that the op is issued to; ops of a stream run in the order of the text"),
    "micro_batch": (INT, "the part of the batch that the op belongs to"),
    "sms": (INT, "SMs that the op's kernel may occupy"),
    "us": (FLOAT, "predicted microseconds at that share, without waiting"),
    "send_us": (FLOAT, "of `us`, what an exchange keeps all SMs busy for when it starts"),
    "receive_us": (FLOAT, "of `us`, what an exchange keeps all SMs busy for when it ends"),
    "buffers": (INTS, "the buffer that each result lies in; -1 for a view of an operand"),
}
"""Attributes that any op of a function may have beside its own: when and where a schedule runs it."""


class OpDef:
    """One op of the IR. The docstring of a subclass is its line in the reference."""

    name: ClassVar[str]
    operands: ClassVar[str] = ""
    """Operand names; `?` marks an optional last one, `*` any number at the end."""
    attrs: ClassVar[dict[str, Attr]] = {}
    results: ClassVar[str] = "y"
    effect: ClassVar[str] = ""
    """"" (pure), "read" or "write" of the cache operand: such ops keep their order."""
    takes_quantised: ClassVar[bool] = False
    """Whether `evaluate` wants quantised operands as `numeric.Quantised`; else it gets what they stand for."""

    def __init_subclass__(cls) -> None:
        if cls.name in OPS:
            raise ValueError(f"op {cls.name} is declared twice")
        OPS[cls.name] = cls()

    def infer(self, t: Sequence[Type], a: Attrs, module: Module | None) -> list[Type]:
        """Result types from operand types and attributes; raises TypeRuleError."""
        raise NotImplementedError

    def evaluate(self, x: Sequence[Any], a: Attrs, ctx: Any) -> list[Any]:
        """Reference evaluation in plain torch; `ctx` is an `evaluate.Evaluator`."""
        raise NotImplementedError

    def flops(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        """Floating-point operations, a multiply-add counting two."""
        return 0

    def bytes_read(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        """Bytes read from memory; by default every operand once."""
        return sum((x.nbytes() for x in t if isinstance(x, TensorType)), start=0)

    def bytes_written(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        """Bytes written to memory; by default every result once."""
        return sum((x.nbytes() for x in r if isinstance(x, TensorType)), start=0)

    def bytes_sent(self, t: Sequence[Type], r: Sequence[Type], a: Attrs) -> Size:
        """Bytes sent to other devices."""
        return 0

    def arity(self) -> tuple[int, int]:
        """Least and greatest number of operands."""
        names = self.operands.split()
        if names and names[-1].endswith("*"):
            return len(names) - 1, 1 << 16
        optional = sum(n.endswith("?") for n in names)
        return len(names) - optional, len(names)


OPS: dict[str, OpDef] = {}


def operand_type(operand: Operand) -> Type:
    """The type of a value or of a weight reference."""
    t = operand.type
    if t is None:
        raise TypeRuleError(f"{operand!r} has no type")
    return t


def check_attrs(op: OpDef, attrs: Attrs) -> None:
    """Raise TypeRuleError for an unknown, missing or ill-typed attribute."""
    for key, value in attrs.items():
        if key in PLACEMENT and key not in op.attrs and not op.name.startswith("weight."):
            if not PLACEMENT[key][0].accepts(value):
                raise TypeRuleError(f"attribute {key} of {op.name} must be {PLACEMENT[key][0]}, got {value!r}")
            continue
        if key not in op.attrs:
            known = ", ".join(op.attrs) or "none"
            raise TypeRuleError(f"{op.name} has no attribute {key!r} (it has: {known})")
        if not op.attrs[key].accepts(value):
            raise TypeRuleError(f"attribute {key} of {op.name} must be {op.attrs[key]}, got {value!r}")
    for key, spec in op.attrs.items():
        if not spec.optional and key not in attrs:
            raise TypeRuleError(f"{op.name} needs attribute {key!r} ({spec})")


def infer(op: OpDef, operands: Sequence[Operand], attrs: Attrs, module: Module | None) -> list[Type]:
    """Check arity and attributes, then apply the op's type rule; raises TypeRuleError."""
    low, high = op.arity()
    if not low <= len(operands) <= high:
        want = str(low) if low == high else f"{low} to {high}" if high < 1 << 16 else f"at least {low}"
        raise TypeRuleError(f"{op.name} takes {want} operands ({op.operands or 'none'}), got {len(operands)}")
    check_attrs(op, attrs)
    types = [operand_type(o) for o in operands]
    require(not any(isinstance(t, TensorType) and not t.shape for t in types), "an operand has no dims")
    results = op.infer(types, attrs, module)
    for t in results:
        if isinstance(t, TensorType):
            _sound(t)
    return results


def _sound(t: TensorType) -> None:
    """Raise TypeRuleError for dims that no tensor has or a scale block of more dims than the tensor."""
    for d in t.shape:
        require(not isinstance(d, int) or 0 <= d <= MAX_DIM, f"a result would have the dim {d}")
    require(t.quant is None or len(t.quant.block) <= len(t.shape), f"a scale block has more dims than {t}")


def placement(op: str, *, in_program: bool) -> str:
    """Why an op may not stand where it does (weight programs hold `weight.*` ops only); empty when it may."""
    if op.startswith("weight.") == in_program:
        return ""
    return f"{op} cannot stand in a {'weight program' if in_program else 'function'}"


def require(condition: bool, message: str) -> None:
    """Raise TypeRuleError(message) unless the condition holds."""
    if not condition:
        raise TypeRuleError(message)


def tensor(t: Type, what: str, rank: int | None = None, dtypes: tuple[str, ...] = ()) -> TensorType:
    """`t` as a tensor type of the given rank and element types; raises TypeRuleError naming the operand."""
    if not isinstance(t, TensorType):
        raise TypeRuleError(f"{what} must be a tensor, got {t}")
    require(rank is None or len(t.shape) == rank, f"{what} must have {rank} dims, got {t}")
    require(not dtypes or t.dtype in dtypes, f"{what} must be {' or '.join(dtypes)}, got {t.dtype}")
    return t


def cache(t: Type, what: str = "kv") -> CacheType:
    """`t` as a cache type; raises TypeRuleError."""
    if not isinstance(t, CacheType):
        raise TypeRuleError(f"{what} must be a cache, got {t}")
    return t


def index(t: Type, what: str = "layer") -> None:
    """Raise TypeRuleError unless `t` is an index."""
    require(isinstance(t, IndexType), f"{what} must be an index, got {t}")


def same(a: Size, b: Size, what: str) -> None:
    """Raise TypeRuleError unless two dims are equal."""
    require(a == b, f"{what}: {a} and {b} differ")


def known(size: Size, what: str) -> int:
    """`size` as an integer; raises TypeRuleError when it is symbolic."""
    if not isinstance(size, int):
        raise TypeRuleError(f"{what} must be known, got {size}")
    return size
