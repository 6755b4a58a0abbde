"""What the arguments of a generated kernel stand for, so that a launch can fill them in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moec.ir import CacheType, Op, TensorType, Value, WeightRef

if TYPE_CHECKING:
    from moec.codegen.triton.fused.products import Product

What = Literal["data", "scale", "cache", "order", "source", "blocks", "row", "head", "size"]
TRITON = {
    "f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64", "fp8_e4m3": "fp8e4nv", "fp8_e5m2": "fp8e5",
    "i32": "i32", "i64": "i64", "u8": "u8",
}  # fmt: skip
SCALES = {"f32": "fp32", "ue8m0": "u8"}


@dataclass(frozen=True)
class Argument:
    """A kernel's run-time argument: its name, its Triton type, and what it stands for.

    `data` and `scale` of a value or weight, a `cache`'s layer, `source` and `blocks` of a dispatch's rows, the distance
    between `row`s or `head`s of a value in elements, or a `size`: an expression over the run-time symbols.
    """

    name: str
    kind: str
    what: What
    of: Value | WeightRef | str | int


@dataclass
class Generated:
    """A kernel's text, its arguments in order, the ops that it computes and the values that it writes."""

    name: str
    source: str
    arguments: list[Argument]
    ops: list[Op]
    outputs: list[Value]
    rows: str
    """The number of rows, as an expression over the run-time symbols."""
    dims: dict[str, int] = field(default_factory=dict)
    product: Product | None = None
    """What the kernel multiplies; None for a row-wise one."""
    problem: Any = None
    """The random operands of the problem that was built last (fused/check.py)."""


def pointer(dtype: str) -> str:
    """The Triton type of a pointer to elements of an IR type."""
    return "*" + TRITON[dtype]


def tensor_of(operand: Value | WeightRef) -> TensorType:
    """The operand's type, which must be a tensor's."""
    assert isinstance(operand.type, TensorType), operand
    return operand.type


def cache_of(operand: Value | WeightRef) -> CacheType:
    """The operand's type, which must be a cache's."""
    assert isinstance(operand.type, CacheType), operand
    return operand.type


def width(operand: Value | WeightRef) -> int:
    """Elements of one row: the product of all dims but the first."""
    total = 1
    for d in tensor_of(operand).shape[1:]:
        total *= int(d)  # type: ignore[arg-type]
    return total
