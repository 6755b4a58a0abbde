"""Random valid modules: ops are drawn from the op table and kept where their rule accepts the operands drawn."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from moec.ir import (
    OPS,
    Builder,
    CacheType,
    IndexType,
    Location,
    Module,
    Op,
    Quant,
    TensorType,
    Type,
    TypeRuleError,
    Value,
)
from moec.ir.builder import weight_ref
from moec.ir.dims import DimError, Size, ceildiv, symbol
from moec.ir.module import Attribute, Function, Operand, Weight
from moec.ir.optable import Attr
from moec.ir.rewrite import append_to_program
from moec.ir.types import BITS, CACHE_KINDS, QUANTISED

PLAIN = tuple(b for b in BITS if b not in QUANTISED)
ODD_TEXT = st.text(max_size=8) | st.sampled_from(["true", "inf", "nan-x", "loc", "1x128", "-", 'q"', "\\", "\n"])
FLOATS = st.floats(allow_nan=False)


@st.composite
def sizes(draw: st.DrawFn) -> Size:
    size: Size = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 128, 7168]))
    if draw(st.booleans()):
        other = draw(st.integers(1, 9))
        name = symbol(draw(st.sampled_from(["T", "S", "B", "ab_1"])))
        size = draw(st.sampled_from([name, name * other, name + other, name * symbol("S"), ceildiv(name, 128) + other]))
    return size


@st.composite
def types(draw: st.DrawFn) -> Type:
    kind = draw(st.sampled_from(["tensor", "tensor", "tensor", "matrix", "ids", "cache", "index"]))
    if kind == "index":
        return IndexType()
    if kind == "cache":
        shape = (draw(sizes()), draw(sizes()), 64, draw(st.sampled_from([4, 576])))
        return CacheType(draw(st.sampled_from(CACHE_KINDS)), shape, draw(st.sampled_from(["bf16", "f32", "fp8_e4m3"])))
    tokens = symbol("T")
    if kind == "ids":
        return TensorType("i32", draw(st.sampled_from([(tokens,), (tokens, 2), (9,)])))
    if kind == "matrix":
        return TensorType(draw(st.sampled_from(["bf16", "f32"])), (tokens, draw(st.sampled_from([8, 12]))))
    dims = tuple(draw(st.lists(sizes(), min_size=1, max_size=4)))
    quantised = draw(st.booleans())
    quant = None
    if quantised:
        block = tuple(draw(st.lists(st.sampled_from([0, 1, 16, 128]), min_size=1, max_size=min(2, len(dims)))))
        quant = Quant(draw(st.sampled_from(["f32", "ue8m0"])), block)
    axes = [draw(st.sampled_from([None, "dp", "ep", "tp", "dp*ep"])) for _ in dims]
    return TensorType(
        draw(st.sampled_from(QUANTISED if quantised else PLAIN)),
        dims,
        quant,
        draw(st.sampled_from([None, "lane16", "rows-4"])),
        tuple(axes) if draw(st.booleans()) else None,
    )


def attribute(spec: Attr) -> st.SearchStrategy[Attribute]:
    """A value of an attribute's kind, often one that a rule can accept."""
    match spec.kind:
        case "int":
            return st.integers(0, 8) | st.integers(-(2**62), 2**62)
        case "float":
            return FLOATS
        case "bool":
            return st.booleans()
        case "ints":
            return st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple)
    return st.sampled_from(spec.choices) if spec.choices else ODD_TEXT | st.sampled_from(["T", "T*8", "1x128"])


FREE: st.SearchStrategy[Any] = st.recursive(
    ODD_TEXT | FLOATS | st.booleans() | st.integers(-(2**62), 2**62),
    lambda x: st.lists(x, max_size=3).map(tuple),
    max_leaves=4,
)
KEYS = st.from_regex(r"\A[a-z_][a-z0-9_]{0,6}\Z").filter(lambda k: k != "version")
FUNCTION_OPS = sorted(n for n in OPS if not n.startswith(("weight.", "event.")))
"""Events are right in pairs across streams only; schedules have tests of their own."""
PROGRAM_OPS = sorted(n for n in OPS if n.startswith("weight."))


@st.composite
def operations(draw: st.DrawFn, names: list[str]) -> tuple[str, dict[str, Attribute]]:
    name = draw(st.sampled_from(names))
    attrs = {k: draw(attribute(s)) for k, s in OPS[name].attrs.items() if not s.optional or draw(st.booleans())}
    return name, attrs


def _weight(draw: st.DrawFn, name: str) -> Weight:
    indices = draw(st.sampled_from([(), (("l", 0, 3),), (("l", 1, 4), ("e", 0, 16))]))
    program = Function(name, [Value(i[0], IndexType()) for i in indices])
    shape = tuple(draw(st.lists(st.sampled_from([8, 12, 128, 256]), min_size=1, max_size=3)))
    loaded = Value("0", TensorType("bf16", shape))
    attrs: dict[str, Attribute] = {"tensor": draw(ODD_TEXT), "shape": shape, "dtype": "bf16"}
    weight = Weight(name, loaded.type, indices, program)
    program.ops.append(Op("weight.load", [], attrs, [loaded]))
    program.returns = [loaded]
    for op, given in draw(st.lists(operations(PROGRAM_OPS), max_size=4)):
        if OPS[op].operands in ("x", "parts*"):
            try:
                append_to_program(weight, op, **given)
            except TypeRuleError:
                continue
    return weight


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """A module of a few weights and functions; every op drawn that its rule accepts is kept."""
    module = Module("m", draw(st.dictionaries(KEYS, FREE, max_size=3)))
    for i in range(draw(st.integers(0, 2))):
        module.weights[f"w.{i}"] = _weight(draw, f"w.{i}")
    for number in range(draw(st.integers(1, 2))):
        builder = Builder(module, f"f.{number}", draw(st.dictionaries(KEYS, FREE, max_size=2)))
        values: list[Operand] = [
            builder.arg(f"a{i}", t) for i, t in enumerate(draw(st.lists(types(), min_size=1, max_size=6)))
        ]
        values += [weight_ref(w) for w in module.weights.values()]
        for name, attrs in draw(st.lists(operations(FUNCTION_OPS), max_size=12)):
            low, high = OPS[name].arity()
            count = draw(st.integers(low, min(high, low + 2)))
            operands = [draw(st.sampled_from(values)) for _ in range(count)]
            loc = Location("model.py", draw(st.integers(0, 999)), ("fuse",)) if draw(st.booleans()) else None
            try:
                made = builder.emit(name, *operands, loc=loc, **attrs)
            except (TypeRuleError, DimError):
                continue
            values += made if isinstance(made, tuple) else (made,)
        returned = [v for v in values if isinstance(v, Value)]
        builder.returns(*draw(st.lists(st.sampled_from(returned), max_size=3)))
    return module
