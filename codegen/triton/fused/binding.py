"""What the arguments of a generated kernel stand for, so that a launch can fill them in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moec.codegen.triton.errors import NoKernel
from moec.ir import CacheType, Op, TensorType, Value, WeightRef
from moec.ir.types import BITS, SCALE_BITS

if TYPE_CHECKING:
    from moec.codegen.triton.fused.products import Product

What = Literal["data", "scale", "cache", "cache_scale", "cache_exact", "source", "blocks", "row", "head", "size"]
TRITON = {
    "f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64", "fp8_e4m3": "fp8e4nv", "fp8_e5m2": "fp8e5",
    "i32": "i32", "i64": "i64", "u8": "u8",
}  # fmt: skip
SCALES = {"f32": "fp32", "ue8m0": "u8"}


@dataclass(frozen=True)
class Argument:
    """A kernel's run-time argument: its name, its Triton type, and what it stands for.

    `data` and `scale` of a value or weight, a `cache`'s layer (of a scaled one also its `cache_scale`s and the part
    that is kept exact), `source` and `blocks` of a dispatch's rows, the distance between `row`s or `head`s of a value
    in elements, or a `size`: an expression over the run-time symbols.
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


def cache_distances(kind: CacheType) -> tuple[int, int, int]:
    """Between rows of a cache: in its elements, in its scales, and in BF16 elements of the part that is kept exact.

    A scaled row of 656 bytes is 512 of FP8 latent, four float32 scales and 64 BF16 of rotated key, as FlashMLA has it.
    """
    if kind.quant is None:
        return int(kind.shape[3]), 0, int(kind.shape[3])  # type: ignore[arg-type]
    size = int(kind.row_bytes())  # type: ignore[arg-type]
    scale = SCALE_BITS[kind.quant.scale] // 8
    if size % scale or size % 2 or BITS[kind.dtype] != 8:
        raise NoKernel(op="cache", reason=f"rows of {size} bytes do not keep their parts aligned")
    return size, size // scale, size // 2


def width(operand: Value | WeightRef) -> int:
    """Elements of one row: the product of all dims but the first."""
    total = 1
    for d in tensor_of(operand).shape[1:]:
        total *= int(d)  # type: ignore[arg-type]
    return total
