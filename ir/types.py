"""Types of the IR: what an engine must know of a value before it runs.

A tensor type carries element type, symbolic shape, quantisation (scale format and granularity), storage layout and
sharding. Two types that differ in any of these are different types: a kernel for one cannot be handed the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from moec.ir.dims import Dim, Size, bind, ceildiv

BITS = {
    "f64": 64,
    "f32": 32,
    "bf16": 16,
    "f16": 16,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp4_e2m1": 4,
    "logfmt10": 10,
    "i64": 64,
    "i32": 32,
    "i8": 8,
    "u8": 8,
    "bool": 8,
}
"""Bits of each element type. FP8 formats follow OCP OFP8 (E4M3 without infinities), FP4 the OCP MX specification."""

SCALE_BITS = {"f32": 32, "ue8m0": 8, "logrange": 64}
"""Bits of a scale. `logrange`: the least and the greatest logarithm of a block, for LogFMT."""
QUANTISED = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "logfmt10", "i8")


@dataclass(frozen=True)
class Quant:
    """Scaled storage: `value = element * scale`, one scale per block of the trailing dims (0 spans a whole dim)."""

    scale: str
    block: tuple[int, ...]

    def __str__(self) -> str:
        return f"scale({self.scale}, {'x'.join(map(str, self.block))})"


@dataclass(frozen=True)
class TensorType:
    """A dense tensor, e.g. `fp8_e4m3[T, 7168] scale(f32, 1x128)`."""

    dtype: str
    shape: tuple[Size, ...]
    quant: Quant | None = None
    layout: str | None = None
    sharding: tuple[str | None, ...] | None = None

    def __str__(self) -> str:
        out = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        if self.quant:
            out += f" {self.quant}"
        if self.layout:
            out += f" layout({self.layout})"
        if self.sharding:
            out += f" shard({', '.join(s or '-' for s in self.sharding)})"
        return out

    def with_dtype(self, dtype: str) -> TensorType:
        """The same shape in another element type; quantisation is dropped."""
        return replace(self, dtype=dtype, quant=None)

    def with_shape(self, *shape: Size) -> TensorType:
        """The same element type with another shape; layout and sharding are dropped."""
        return TensorType(self.dtype, tuple(shape), self.quant)

    def elements(self) -> Size:
        """Number of elements, symbolic when a dim is."""
        return prod(self.shape, start=1)

    def nbytes(self) -> Size:
        """Bytes of elements and scales, symbolic when a dim is."""
        data = ceildiv(self.elements() * BITS[self.dtype], 8)
        return data + self.scale_elements() * (SCALE_BITS[self.quant.scale] // 8) if self.quant else data

    def scale_elements(self) -> Size:
        """Number of scales; 0 when not quantised."""
        if self.quant is None:
            return 0
        lead = len(self.shape) - len(self.quant.block)
        blocks = [ceildiv(d, b) if b else 1 for d, b in zip(self.shape[lead:], self.quant.block, strict=True)]
        return prod(blocks, start=prod(self.shape[:lead], start=1))

    def symbols(self) -> frozenset[str]:
        """Free symbols of the shape."""
        return frozenset().union(*(d.symbols() for d in self.shape if isinstance(d, Dim)))

    def bound(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape under `values`."""
        return tuple(bind(d, values) for d in self.shape)


@dataclass(frozen=True)
class CacheType:
    """A paged cache `kind[dims]`, e.g. `kv.latent[61, P, 64, 576] of(bf16)`: layers, pages, tokens a page, width.

    A scaled cache has a scale for each block of a row and keeps the last `exact` elements, the rotary key, in BF16:
    `of(fp8_e4m3 scale(f32, 1x128), bf16 64)`.
    """

    kind: str
    shape: tuple[Size, ...]
    dtype: str
    quant: Quant | None = None
    exact: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise ValueError(f"unknown cache {self.kind}: the parser knows {', '.join(CACHE_KINDS)}")

    def __str__(self) -> str:
        stored = f"{self.dtype} {self.quant}, bf16 {self.exact}" if self.quant else self.dtype
        return f"{self.kind}[{', '.join(map(str, self.shape))}] of({stored})"

    def row_bytes(self) -> Size:
        """Bytes of one row: elements, their scales, and the part that is kept exact."""
        width = self.shape[-1]
        if self.quant is None:
            return ceildiv(width * BITS[self.dtype], 8)
        scales = ceildiv(width - self.exact, self.quant.block[-1]) * (SCALE_BITS[self.quant.scale] // 8)
        return ceildiv((width - self.exact) * BITS[self.dtype], 8) + scales + self.exact * 2

    def nbytes(self) -> Size:
        """Bytes of the whole cache."""
        if self.quant is None:
            return ceildiv(prod(self.shape, start=1) * BITS[self.dtype], 8)
        return prod(self.shape[:-1], start=1) * self.row_bytes()

    def symbols(self) -> frozenset[str]:
        """Free symbols of the shape."""
        return frozenset().union(*(d.symbols() for d in self.shape if isinstance(d, Dim)))


@dataclass(frozen=True)
class IndexType:
    """A loop index: the layer of a layer function, the expert of a weight program."""

    def __str__(self) -> str:
        return "index"

    def symbols(self) -> frozenset[str]:
        """No free symbols."""
        return frozenset()


Type = TensorType | CacheType | IndexType
CACHE_KINDS = ("kv.latent", "kv.heads", "kv.indexed")
