"""How weights lie in the artifact: one array of stored elements and one of scales, index ranges leading."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moec.ir import TensorType, Weight
from moec.ir.lane16 import ROWS, format_of

SAFETENSORS = {"f32": "F32", "bf16": "BF16", "fp8_e4m3": "U8", "fp4_e2m1": "U8"}
"""Packed elements of fewer than 16 bits are stored as bytes: their order is the kernel's, not the format's."""
BYTES = {"F32": 4, "BF16": 2, "U8": 1}
PLAIN = {"f32": "float32", "bf16": "uint16", "fp8_e4m3": "uint8"}
SCALES = {"f32": ("F32", "float32"), "ue8m0": ("U8", "uint8")}


@dataclass(frozen=True)
class StoredArray:
    """One tensor of the weight file and how a kernel sees it (4-byte lanes for packed matrices)."""

    name: str
    safetensors_dtype: str
    shape: tuple[int, ...]
    lane_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape, start=1) * BYTES[self.safetensors_dtype]

    @property
    def lanes(self) -> int:
        """Elements as the kernel counts them."""
        return self.nbytes // {"int32": 4, "float32": 4, "uint16": 2, "uint8": 1}[self.lane_dtype]

    @property
    def lane_shape(self) -> tuple[int, ...]:
        """The flat shape that the program takes."""
        return (self.lanes,)


def scale_shape(t: TensorType) -> tuple[int, ...]:
    """Dims of the scales of a quantised tensor in its plain layout."""
    assert t.quant is not None
    free = len(t.shape) - len(t.quant.block)
    sizes = [int(d) for d in t.shape]  # type: ignore[arg-type]
    blocks = [-(-d // b) if b else 1 for d, b in zip(sizes[free:], t.quant.block, strict=True)]
    return (*sizes[:free], *blocks)


def stored_arrays(weight: Weight) -> list[StoredArray]:
    """The arrays of a weight: data, then `NAME.scale` when it is quantised."""
    t = weight.type
    assert isinstance(t, TensorType)
    lead = tuple(stop - start for _, start, stop in weight.indices)
    shape = tuple(int(d) for d in t.shape)  # type: ignore[arg-type]
    if t.layout is None:
        plain = [StoredArray(weight.name, SAFETENSORS[t.dtype], lead + shape, PLAIN[t.dtype])]
        if t.quant:
            kind, lane = SCALES[t.quant.scale]
            plain.append(StoredArray(f"{weight.name}.scale", kind, lead + scale_shape(t), lane))
        return plain
    *stack, n, k = shape
    fmt, head = format_of(t.dtype, t.quant.block[-2] if t.quant else ROWS), (*lead, *stack)
    stored = SAFETENSORS[t.dtype]
    arrays = [StoredArray(weight.name, stored, (*head, *fmt.shape(n, k), 4 // BYTES[stored]), "int32")]
    if t.quant:
        kind = "U8" if fmt.scale_dtype == "uint8" else "F32"
        arrays.append(StoredArray(f"{weight.name}.scale", kind, (*head, *fmt.scale_shape(n, k)), fmt.scale_dtype))
    return arrays
